"""Write a phantom as a whole slide: a pyramidal tiled TIFF, one band of tiles in memory at a time.

It does not know how tissue is made. Layout as generic tiled TIFF readers expect it: every level a top-level page,
reduced levels with NewSubfileType 1, resolution in px per cm (TIFF 6.0; OpenSlide "generic tiled TIFF").
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from engine.slides.phantom.noise import F32, derive_key, grid_noise, resample, value_noise
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.tissue import share

TILE_PX = 256
BAND_PX = 512
LEVEL_FACTOR = 4
SMALLEST_LEVEL_PX = 1024
LABEL = "synthetic: procedural phantom tissue, drawn by zoomldm-engine; of no patient"
"""Image description of level 0, so that nobody takes the file for a slide of tissue."""
OUTLINE_STEP_PX = 32
BLUR_REACH_PX = 6
GLASS = (245.0, 244.5, 246.0)
PEN = (0.25, 0.45, 0.75)
"""Share of red, green and blue light that a blue marker lets through."""


@dataclass(frozen=True)
class _Slide:
    phantom: Phantom
    height_px: int
    width_px: int
    mpp: float
    pen_marks: bool
    blurred_patch: bool

    def __post_init__(self) -> None:
        if min(self.height_px, self.width_px) < TILE_PX or not self.mpp > 0:
            raise ValueError(
                f"a slide needs at least {TILE_PX}x{TILE_PX} px and mpp > 0 (µm/px); got "
                f"{self.height_px}x{self.width_px} at {self.mpp}. Enlarge it."
            )


def write_phantom_slide(
    path: str | Path,
    phantom: Phantom,
    width_px: int,
    height_px: int,
    mpp: float = 0.5,
    pen_marks: bool = False,
    blurred_patch: bool = False,
) -> None:
    """Write tissue with an irregular outline on glass; levels shrink by 4 until the longer side is at most 1024 px.

    pen_marks: a blue marker stroke along the lower edge of the tissue. blurred_patch: a disc out of focus.
    Raises: ValueError if the slide is smaller than one tile or mpp is not positive.
    """
    slide = _Slide(phantom, height_px, width_px, mpp, pen_marks, blurred_patch)
    shapes = [(height_px, width_px)]
    while max(shapes[-1]) > SMALLEST_LEVEL_PX:
        shapes.append((max(1, shapes[-1][0] // LEVEL_FACTOR), max(1, shapes[-1][1] // LEVEL_FACTOR)))
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, tifffile.TiffWriter(path, bigtiff=True) as tiff:
        # Reduced levels grow on disk while the level above streams by: the tissue is rendered once.
        stores = [
            np.memmap(Path(scratch) / f"{i}.raw", np.uint8, "w+", shape=(*shape, 3))
            for i, shape in enumerate(shapes[1:], 1)
        ]
        for i, shape in enumerate(shapes):
            source = _rendered_bands(slide) if i == 0 else _stored_bands(stores[i - 1])
            below = stores[i] if i < len(stores) else None
            level_mpp = mpp * LEVEL_FACTOR**i
            tiff.write(
                _tiles(source, below),
                shape=(*shape, 3),
                dtype=np.uint8,
                photometric="rgb",
                tile=(TILE_PX, TILE_PX),
                compression="jpeg",
                compressionargs={"level": 90},
                subsampling=(1, 1),
                subfiletype=1 if i else 0,
                resolution=(1e4 / level_mpp, 1e4 / level_mpp),
                resolutionunit="CENTIMETER",
                metadata=None,
                description=None if i else LABEL,
            )


def _tiles(bands: Iterator[np.ndarray], below: np.memmap | None) -> Iterator[np.ndarray]:
    """Cut bands into tiles in row order (the last ones padded white), and fill the next level on the way."""
    filled = 0
    for band in bands:
        if below is not None:
            rows, width = min(band.shape[0] // LEVEL_FACTOR, below.shape[0] - filled), below.shape[1]
            boxes = band[: rows * LEVEL_FACTOR, : width * LEVEL_FACTOR].astype(F32)
            boxes = boxes.reshape(rows, LEVEL_FACTOR, width, LEVEL_FACTOR, 3).mean(axis=(1, 3))
            below[filled : filled + rows] = np.rint(boxes)
            filled += rows
        for y in range(0, band.shape[0], TILE_PX):
            for x in range(0, band.shape[1], TILE_PX):
                tile = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
                part = band[y : y + TILE_PX, x : x + TILE_PX]
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile


def _stored_bands(store: np.memmap) -> Iterator[np.ndarray]:
    for y in range(0, store.shape[0], BAND_PX):
        yield np.asarray(store[y : y + BAND_PX])


def _rendered_bands(slide: _Slide) -> Iterator[np.ndarray]:
    for y in range(0, slide.height_px, BAND_PX):
        height = min(BAND_PX, slide.height_px - y)
        band = np.empty((height, slide.width_px, 3), np.uint8)
        for x in range(0, slide.width_px, BAND_PX):
            width = min(BAND_PX, slide.width_px - x)
            band[:, x : x + width] = _render_block(slide, y, x, height, width)
        yield band


def _render_block(slide: _Slide, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Return uint8 (height, width, 3): glass, tissue inside the outline, then what went wrong with the slide."""
    rows, cols = np.arange(top, top + height), np.arange(left, left + width)
    # The seed also drives the dust, so that two slides do not share one glass.
    dust = grid_noise(derive_key(slide.phantom.seed, "glass"), rows / 2, cols / 2)
    picture = np.array(GLASS, F32) + (dust * F32(1.5))[:, :, None]
    inside = share(_outline_um(slide, rows, cols), 8.0)[:, :, None]
    if inside.any():
        tissue = _focus(slide, top, left, height, width)
        tissue -= picture
        tissue *= inside
        picture += tissue
    if slide.pen_marks:
        stroke = _pen_share(slide, rows, cols)[:, :, None]
        picture *= 1 - stroke * (1 - np.array(PEN, F32))
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)


def _outline_um(slide: _Slide, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Return about how far inside the tissue each pixel lies (µm): an ellipse with a ragged border."""
    first = (int(rows[0]) // OUTLINE_STEP_PX, int(cols[0]) // OUTLINE_STEP_PX)
    last = (int(rows[-1]) // OUTLINE_STEP_PX + 2, int(cols[-1]) // OUTLINE_STEP_PX + 2)
    y = (np.arange(first[0], last[0]) * OUTLINE_STEP_PX / slide.height_px - 0.5)[:, None]
    x = (np.arange(first[1], last[1]) * OUTLINE_STEP_PX / slide.width_px - 0.5)[None, :]
    key = derive_key(slide.phantom.seed, "outline")
    depth = 0.37 - np.hypot(y, x) + 0.11 * value_noise(key, y, x, 0.3) + 0.03 * value_noise(key + 1, y, x, 0.07)
    depth *= min(slide.height_px, slide.width_px) * slide.mpp
    return resample(depth.astype(F32), first, rows / OUTLINE_STEP_PX, cols / OUTLINE_STEP_PX)


def _focus(slide: _Slide, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Return the tissue as float32, out of focus inside the blurred disc."""
    radius = 0.14 * min(slide.height_px, slide.width_px)
    dy = np.arange(top, top + height)[:, None] - 0.45 * slide.height_px
    dx = np.arange(left, left + width)[None, :] - 0.40 * slide.width_px
    depth = radius - np.hypot(dy, dx)
    reach = 2 * BLUR_REACH_PX if slide.blurred_patch and (depth > 0).any() else 0
    y_um, x_um = (top - reach) * slide.mpp, (left - reach) * slide.mpp
    sharp = slide.phantom.render(y_um, x_um, height + 2 * reach, width + 2 * reach, slide.mpp).astype(F32)
    if not reach:
        return sharp
    soft = sharp
    for _ in range(2):  # two box filters make a triangle: no square highlights
        for axis in (0, 1):
            soft = _box_filter(soft, axis)
    share_soft = share(depth, radius * 0.2)[:, :, None].astype(F32)
    sharp = sharp[reach:-reach, reach:-reach]
    return sharp + (soft - sharp) * share_soft


def _box_filter(picture: np.ndarray, axis: int) -> np.ndarray:
    """Average 2·BLUR_REACH_PX + 1 px along one axis; the picture loses BLUR_REACH_PX at both ends."""
    size = 2 * BLUR_REACH_PX + 1
    windows = np.lib.stride_tricks.sliding_window_view(picture, size, axis=axis)
    return windows.mean(axis=-1, dtype=F32)


def _pen_share(slide: _Slide, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Return how much marker ink covers each pixel: one wavy stroke across the lower third."""
    wave = 0.78 + 0.05 * np.sin(cols / slide.width_px * 9.0)
    distance = np.abs(rows[:, None] / slide.height_px - wave[None, :])
    along = np.abs(cols / slide.width_px - 0.5)[None, :]
    return (share(0.012 - distance, 0.004) * share(0.32 - along, 0.02)).astype(F32)
