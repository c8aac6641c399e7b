"""Find the tissue of a slide at a coarse scale, and say which share of a field it is.

Invariant: a mask is bool (h, w) over the whole slide; shares are exact areas of it. The default needs no weights:
colour in optical density, Otsu's threshold within limits, then clean-up in µm. Ink is told by its hue. Other methods
plug in as `FindTissue`. It does not know tiles or files. Source: Otsu 1979; optical density of H&E, Ruifrok &
Johnston 2001.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from engine.core.errors import SlideError
from engine.slides.backends.base import ABSENT
from engine.slides.slide import Slide

MAX_OVERVIEW_PX = 2**28
"""16384²: 130 mm on both sides at 8 µm/px, wider than any glass. What lies beyond is a wrong µm/px or a wrong size."""
PIECE_PX = 128
"""An overview is read in squares of this size: a slide without reduced levels costs 50 MB at a time."""


@dataclass(frozen=True)
class Overview:
    """A whole slide, small."""

    pixels: NDArray[np.uint8]
    """(h, w, 3)."""
    valid: NDArray[np.bool_]
    """(h, w); what is not valid is white (not in the file) or grey (damaged at every level)."""
    mpp: float
    """µm/px."""
    scale: tuple[float, float]
    """Level-0 px per px (x, y)."""
    lost: float = 0.0
    """Share of the slide that is damaged at every level: whether there is tissue cannot be told."""
    damaged: int = 0
    """Blocks of the file that could not be decoded, of the levels that were read."""

    @property
    def empty(self) -> NDArray[np.bool_]:
        """Return where the file holds nothing, (h, w): never written, masked, nodata. What is damaged was there."""
        return ~self.valid & (self.pixels == ABSENT).all(axis=2)


class FindTissue(Protocol):
    """A method that finds tissue."""

    def __call__(self, overview: Overview) -> NDArray[np.bool_]:
        """Return the mask (h, w) of an overview."""
        ...


@dataclass(frozen=True)
class TissueMask:
    """Where the tissue of a slide is."""

    mask: NDArray[np.bool_]
    """(h, w)."""
    scale: tuple[float, float]
    """Level-0 px per px of the mask (x, y)."""
    size: tuple[int, int]
    """Level-0 px of the slide (w, h); the last px of the mask may reach beyond."""
    lost: float = 0.0
    """Share of the slide where damage hid whether there is tissue; 0 where the tissue was drawn."""

    @property
    def total_share(self) -> float:
        """Share of the slide that is tissue."""
        return float(self.mask.mean())

    def share(self, x: NDArray[np.floating], y: NDArray[np.floating], w: float, h: float) -> NDArray[np.float64]:
        """Return which share of w × h fields (level-0 px, corners x and y, broadcast) is tissue.

        What lies beyond the slide is none.
        """
        total = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1))
        np.cumsum(np.cumsum(self.mask, axis=0, dtype=np.float64), axis=1, out=total[1:, 1:])
        (left, right), (top, bottom) = (
            [np.clip(v, 0, n) / scale for v in (corner, corner + length)]
            for corner, length, n, scale in zip((x, y), (w, h), self.size, self.scale, strict=True)
        )
        inside = _sum_to(total, bottom, right) - _sum_to(total, top, right)
        inside += _sum_to(total, top, left) - _sum_to(total, bottom, left)
        return inside / (w / self.scale[0] * (h / self.scale[1]))


def _sum_to(total: NDArray[np.float64], y: NDArray[np.floating], x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the sum above and left of fractional positions: bilinear in a table of sums is exact."""
    y, x = (np.clip(v, 0, n - 1) for v, n in zip((y, x), total.shape, strict=True))
    row, column = (np.minimum(v.astype(np.int64), n - 2) for v, n in zip((y, x), total.shape, strict=True))
    dy, dx = y - row, x - column
    above = total[row, column] * (1 - dx) + total[row, column + 1] * dx
    below = total[row + 1, column] * (1 - dx) + total[row + 1, column + 1] * dx
    return above * (1 - dy) + below * dy


@dataclass(frozen=True)
class TissueConfig:
    """How tissue is found."""

    method: Literal["stain", "everything"] = "stain"
    """stain: by the colour of the dyes, for H&E. everything: the whole slide, for cut-outs and other pictures."""
    mpp: float = 8.0
    """µm/px of the overview the tissue is found on."""
    smallest_um2: float = 20_000.0
    """Pieces of tissue below this area (µm²) are dust; the default is a square of 141 µm, about a 20x tile."""
    largest_hole_um2: float = 60_000.0
    """Holes up to this area (µm²) belong to the tissue, as lumina and fat do; the default is a square of 245 µm."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0) or min(self.smallest_um2, self.largest_hole_um2) < 0:
            raise ValueError(
                f"tissue.mpp must be positive and areas not negative; got {self.mpp}, {self.smallest_um2}, "
                f"{self.largest_hole_um2}."
            )


def find_tissue(slide: Slide, config: TissueConfig, method: FindTissue | None = None) -> TissueMask:
    """Return the tissue of a slide, found by `method` or by the one that the config names.

    Raises: SlideError `vanished` or `too_large`; ValueError if a method returns another shape.
    """
    overview = read_overview(slide, config.mpp)
    mask = (method or method_of(config))(overview)
    if mask.shape != overview.valid.shape or mask.dtype != np.bool_:
        raise ValueError(f"a tissue mask must be bool {overview.valid.shape}; got {mask.dtype} {mask.shape}.")
    return TissueMask(mask, overview.scale, (slide.width, slide.height), overview.lost)


def method_of(config: TissueConfig) -> FindTissue:
    """Return the built-in method that a config names."""
    return StainTissue(config) if config.method == "stain" else _everything


def _everything(overview: Overview) -> NDArray[np.bool_]:
    return overview.valid.copy()


def overview_size(slide: Slide, mpp: float) -> tuple[int, int]:
    """Return the px (h, w) of a whole slide at `mpp` µm/px; the last ones may reach beyond it.

    Raises: SlideError `too_large` for more than MAX_OVERVIEW_PX, before anything is allocated.
    """
    sizes = zip((slide.height, slide.width), slide.field(1, mpp)[::-1], strict=True)
    height, width = (max(1, math.ceil(n / s - 1e-6)) for n, s in sizes)
    if height * width > MAX_OVERVIEW_PX:
        raise SlideError(
            "too_large",
            f"{slide.name}: the overview on which tissue is found must have at most {MAX_OVERVIEW_PX} px; at {mpp:g} "
            f"µm/px it would have {width}x{height}, because the slide has {slide.width}x{slide.height} px of "
            f"{slide.resolution.mpp:.4g} µm/px ({slide.resolution.source}). If these are right, take a coarser "
            "overview (--finder.mpp); else correct µm/px in the overrides table (--overrides).",
        )
    return height, width


def read_overview(slide: Slide, mpp: float) -> Overview:
    """Read a whole slide at `mpp` µm/px. Where a level is damaged, the next finer one is read instead.

    Raises: SlideError `vanished` or `too_large`.
    """
    scale, (height, width) = slide.field(1, mpp), overview_size(slide, mpp)
    pixels, valid = np.empty((height, width, 3), np.uint8), np.empty((height, width), np.bool_)
    lost = damaged = 0
    for y in range(0, height, PIECE_PX):
        for x in range(0, width, PIECE_PX):
            size = min(PIECE_PX, width - x), min(PIECE_PX, height - y)
            level = slide.level_for(mpp)
            region = slide.read(x * scale[0], y * scale[1], *size, mpp, level)
            damaged += region.damaged
            while region.damaged and level > 0:
                level -= 1
                region = slide.read(x * scale[0], y * scale[1], *size, mpp, level)
                damaged += region.damaged
            where = np.s_[y : y + size[1], x : x + size[0]]
            pixels[where], valid[where] = region.pixels, region.valid
            lost += 0 if region.lost is None else int(region.lost.sum())
    return Overview(pixels, valid, mpp, scale, lost / valid.size, damaged)


def check_seen(slide: Slide, lost: float, limit: float) -> None:
    """Refuse a slide of which a larger share than `limit` is damaged at every level, so that tissue cannot be seen.

    Raises: SlideError `damaged`.
    """
    if lost > limit:
        raise SlideError(
            "damaged",
            f"{slide.name}: at most {limit:.0%} of a slide may be damaged; {lost:.0%} of it cannot be decoded, so that "
            f"nobody can tell whether there is tissue. Copy {slide.path} again, or raise --blocks.slide_damage.",
        )


@dataclass(frozen=True)
class StainTissue:
    """Tissue is what H&E colours: its green is darkest, by more than Otsu's threshold."""

    config: TissueConfig

    LOWEST, HIGHEST = 0.05, 0.12
    """Otsu's threshold is kept within these optical densities: on bare glass it would part noise from noise, on a slide
    full of tissue nuclei from stroma."""
    LOOSE = 0.03
    """Optical density that loose tissue and fat reach at a wide look."""
    FINE_UM, WIDE_UM, RIM_UM, CLOSING_UM = 12.0, 40.0, 48.0, 24.0
    """Widths (µm): of both looks (sigma), of the rim a wide look adds, of gaps that are closed."""

    def __call__(self, overview: Overview) -> NDArray[np.bool_]:
        """Return the mask (h, w)."""
        usable = overview.valid
        if not usable.any():
            return np.zeros_like(usable)
        px = overview.mpp
        density = optical_density(overview)
        ink = _grow(is_ink(density), 16 / px)
        density[:, ink | ~usable] = 0  # as glass
        fine, wide = (colour_of(density, um / px) for um in (self.FINE_UM, self.WIDE_UM))
        threshold = float(np.clip(threshold_otsu(fine[usable]), self.LOWEST, self.HIGHEST))
        # Fat is thin walls around glass: a wide look sees it, and spreads over borders; that rim is taken back.
        loose = _shrink(wide > self.LOOSE, self.RIM_UM / px)
        found = (fine > threshold) | loose
        found = _shrink(_grow(found, self.CLOSING_UM / px), self.CLOSING_UM / px)
        found = _without_small(found & ~ink, self.config.smallest_um2 / px**2)
        found |= _small_holes(found, self.config.largest_hole_um2 / px**2)
        return found & ~ink & usable


def colour_of(density: NDArray[np.float32], sigma_px: float) -> NDArray[np.float32]:
    """Return how far the dyes part the colours (optical density), after smoothing; grey dust and shadows have none."""
    smooth = [ndimage.gaussian_filter(d, sigma_px, mode="nearest") for d in density]
    return np.ptp(np.stack(smooth), axis=0)


def optical_density(overview: Overview) -> NDArray[np.float32]:
    """Return −ln of the light that passes, per colour (3, h, w); the glass is taken from the slide's brightest px."""
    pixels = overview.pixels[overview.valid] if overview.valid.any() else overview.pixels.reshape(-1, 3)
    glass = np.clip(np.percentile(pixels, 99, axis=0), 200, 255).astype(np.float32)
    light = (overview.pixels.astype(np.float32) + 1) / (glass + 1)
    return np.maximum(-np.log(light), 0).transpose(2, 0, 1)


def is_ink(density: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return where the colour is that of no H&E: blue and green pens, red pens, black ones.

    Haematoxylin absorbs red about as much as green, and both more than blue; eosin absorbs green by far most. Ink of a
    blue or green pen absorbs red most; that of a red pen blue as much as green, and no red; black absorbs all alike.
    Brown DAB also absorbs blue, but red with it.
    """
    red, green, blue = density
    dark = density.max(axis=0)
    cold = (red > 1.35 * green) & (red > 0.25)
    warm = (blue > 0.8 * green) & (green > 0.5) & (red < 0.15 * blue)
    black = (dark > 1.0) & (density.min(axis=0) > 0.75 * dark)
    # Ink across tissue looks like the densest nuclei, only darker in red: it is followed from where it lies on glass.
    inked = (red > 0.75 * green) & (red > 1.1)
    return ndimage.binary_propagation(cold, mask=cold | inked) | warm | black  # type: ignore[operator]


def _grow(mask: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Return what lies within `radius` px of a mask."""
    return ndimage.distance_transform_edt(~mask) <= radius if mask.any() else mask  # type: ignore[operator]


def _shrink(mask: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Undo `_grow`; beyond the border counts as inside, so that tissue is not eaten from there."""
    return ~_grow(~mask, radius)


def _small_holes(mask: NDArray[np.bool_], area_px: float) -> NDArray[np.bool_]:
    """Return the holes of a mask below an area; what reaches the border is no hole: small slides have small glass."""
    large = _without_small(~mask, area_px)
    outside = ndimage.binary_propagation(
        np.pad(np.zeros_like(mask), 1, constant_values=True), mask=np.pad(~mask, 1, constant_values=True)
    )
    return ~mask & ~large & ~np.asarray(outside, np.bool_)[1:-1, 1:-1]


def _without_small(mask: NDArray[np.bool_], area_px: float) -> NDArray[np.bool_]:
    """Return a mask without connected parts below an area."""
    labels: NDArray[np.int32] = np.asarray(ndimage.label(mask)[0])  # type: ignore[index]
    large = np.bincount(labels.ravel()) >= area_px
    large[0] = False
    return large[labels]
