"""A slide: its size, its µm/px and where they come from, and windows of it at any µm/px.

Invariant: a window covers exactly the field that was asked for, whatever the levels: it is cut from the coarsest
level that is fine enough, at a fraction of a px, and reduced once, with anti-aliasing. A px that the file does not
give is marked invalid. It does not know tissue, grids or models.

Threads may read one slide at once. A slide cannot be pickled: send its path and open it once per process
(`OpenSlides` keeps the last few open).
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import EngineError, SlideError
from engine.slides.backends import picture, tiff, vendor
from engine.slides.backends.arrays import open_ngff
from engine.slides.backends.levels import Levels, Window, level_scale
from engine.slides.resolution import Overrides, Resolution, resolve

LEVEL_SLACK = 1.01
"""A level that is coarser than asked for by less than this is fine enough: 4.0002x levels, 0.5018 µm/px for 0.5."""
WHOLE_DRIFT_PX = 0.05
"""A reduction is by a whole factor when that shifts no px of the window by more than this."""
MARGIN = 2.0
"""Reach of the filter on both sides of a window, in px of the result."""
FILTER = Image.Resampling.HAMMING
"""For factors that are not whole. On phantoms at 0.25 … 0.5 µm/px all of Pillow's filters come within 10 % of each
other's error; this one is nearest to the mean over a px's area, rings nowhere and costs a third of Lanczos."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".zarr"),
    *PICTURE_SUFFIXES,
)
"""What is looked for in a folder. A DICOM slide is many files: it is opened by naming one of them."""


@dataclass(frozen=True)
class Region:
    """Pixels of a window of a slide."""

    pixels: NDArray[np.uint8]
    """(h, w, 3) RGB. Damaged px are grey (128), px that the file does not hold white: both are invalid."""
    valid: NDArray[np.bool_]
    """(h, w): all that went into the px came from the file, undamaged."""
    damaged: int
    """Blocks of the file under the window that could not be decoded."""


class Slide:
    """An open slide; use `open_slide`. Coordinates are level-0 px from the top left corner."""

    def __init__(self, name: str, path: Path, levels: Levels, resolution: Resolution) -> None:
        self.name, self.path, self.resolution = name, path, resolution
        self.reader = levels.reader
        self.objective = levels.claims.objective
        """Power of the objective as the file states it, or None."""
        self.sizes = levels.sizes
        """(h, w) in px of each level, finest first."""
        self.height, self.width = levels.sizes[0]
        self.scales = tuple(level_scale(levels.sizes[0], size) for size in levels.sizes)
        """Level-0 px per px of each level, (y, x)."""
        self._levels = levels

    def level_for(self, mpp: float) -> int:
        """Return the coarsest level that is fine enough for `mpp` (µm/px)."""
        there = (self.resolution.mpp * math.sqrt(sy * sx) for sy, sx in self.scales)
        return max((i for i, level_mpp in enumerate(there) if level_mpp <= mpp * LEVEL_SLACK), default=0)

    def field(self, px: float, mpp: float) -> tuple[float, float]:
        """Return how many level-0 px (x, y) as many px of `mpp` cover."""
        return px * mpp / self.resolution.mpp_x, px * mpp / self.resolution.mpp_y

    def read(self, x: float, y: float, w: int, h: int, mpp: float, level: int | None = None) -> Region:
        """Return w × h px of `mpp` µm/px with the top left corner at level-0 px (x, y), a fraction of one if need be.

        The window may reach beyond the slide. `level` takes another level than `level_for` names.
        Raises: SlideError `vanished` if the file cannot be read any more; ValueError for an empty window.
        """
        if w < 1 or h < 1 or not mpp > 0:
            raise ValueError(f"a window needs at least 1x1 px and mpp > 0 (µm/px); got {w}x{h} at {mpp}.")
        level = self.level_for(mpp) if level is None else level
        (scale_y, scale_x), (wide, _), (_, tall) = self.scales[level], self.field(w, mpp), self.field(h, mpp)
        across = _Axis(x / scale_x, wide / scale_x, w, self.sizes[level][1])
        down = _Axis(y / scale_y, tall / scale_y, h, self.sizes[level][0])
        window = self._window(level, down, across)
        return Region(*_reduce(window, down, across), window.damaged)

    def _window(self, level: int, down: "_Axis", across: "_Axis") -> Window:
        """Read the px of a level under a window; absent where there are none."""
        if down.inside[0] >= down.inside[1] or across.inside[0] >= across.inside[1]:
            return Window.absent(down.stop - down.start, across.stop - across.start)
        (top, bottom), (left, right) = down.inside, across.inside
        part = self._levels.window(level, top, left, bottom - top, right - left)
        pads = (top - down.start, down.stop - bottom), (left - across.start, across.stop - right)
        if not any(pads[0] + pads[1]):
            return part
        if level and max(pads[0] + pads[1]) <= 1:  # the size of a level is rounded: its last px may be missing
            pixels = np.pad(part.pixels, (*pads, (0, 0)), mode="edge")
            return Window(pixels, np.pad(part.valid, pads, mode="edge"), part.damaged)
        window = Window.absent(down.stop - down.start, across.stop - across.start)
        where = np.s_[pads[0][0] : pads[0][0] + bottom - top, pads[1][0] : pads[1][0] + right - left]
        window.pixels[where], window.valid[where], window.damaged = part.pixels, part.valid, part.damaged
        return window

    def close(self) -> None:
        """Give the file back."""
        self._levels.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Axis:
    """One axis of a window on a level: which px are needed, and where the window lies in them."""

    def __init__(self, first: float, length: float, px: int, size: int) -> None:
        self.px = px
        self.factor = length / px
        whole = round(self.factor)
        starts_whole = abs(first - round(first)) <= WHOLE_DRIFT_PX
        self.is_whole = whole >= 1 and starts_whole and abs(length - whole * px) <= WHOLE_DRIFT_PX * whole
        if self.is_whole:
            self.start, self.stop = round(first), round(first) + whole * px
        else:
            low, high = math.floor(first + 1e-6), math.ceil(first + length - 1e-6)
            reach = math.ceil(MARGIN * max(self.factor, 1))
            # Beyond the slide the filter needs no px.
            self.start = max(low - reach, min(low, 0))
            self.stop = min(high + reach, max(high, size))
        self.inside = max(self.start, 0), min(self.stop, size)
        self.box = first - self.start, first - self.start + length


def _reduce(window: Window, down: _Axis, across: _Axis) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Bring px of a level to the window's px: the mean over whole factors, else `FILTER`."""
    if down.is_whole and across.is_whole:
        factor = round(across.factor), round(down.factor)
        if factor == (1, 1):
            return window.pixels, window.valid

        def shrink(image: Image.Image) -> Image.Image:
            return image.reduce(factor)
    else:
        box = tuple(np.clip((across.box[0], down.box[0], across.box[1], down.box[1]), 0, None).tolist())
        limit = window.pixels.shape[1], window.pixels.shape[0]
        box = box[0], box[1], min(box[2], limit[0]), min(box[3], limit[1])

        def shrink(image: Image.Image) -> Image.Image:
            return image.resize((across.px, down.px), FILTER, box=box)

    if window.valid.all():
        valid = np.ones((down.px, across.px), np.bool_)
    else:
        share = shrink(Image.fromarray(window.valid.astype(np.uint8) * np.uint8(255)))
        valid = np.asarray(share) == 255
    return np.asarray(shrink(Image.fromarray(window.pixels))), valid


def slide_name(path: Path) -> str:
    """Return what a slide is called: its file name without endings such as .svs, .ome.tiff or .ome.zarr."""
    name = path.name
    for suffix in (*SLIDE_SUFFIXES, ".dcm"):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
            break
    return name[:-4] if name.lower().endswith(".ome") and len(name) > 4 else name


def find_slides(folder: Path) -> list[Path]:
    """Return all slides below a folder by their endings, sorted by name; what begins with a dot is left out.

    Raises: EngineError if there is no such folder or no slide in it.
    """
    if not folder.is_dir():
        raise EngineError(f"slides must be a folder; there is none at {folder}. Check the path.")
    found = sorted(_walk(folder), key=lambda p: (slide_name(p), str(p)))
    if not found:
        raise EngineError(f"{folder} must hold slides ({', '.join(SLIDE_SUFFIXES)}); it holds none. Check the path.")
    return found


def _walk(folder: Path) -> list[Path]:
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.suffix.lower() in SLIDE_SUFFIXES:
            found.append(entry)
        elif entry.is_dir() and not entry.is_symlink():  # a linked folder may lead in a circle
            found += _walk(entry)
    return found


def open_slide(path: Path, overrides: Overrides | None = None, mpp: float | None = None) -> Slide:
    """Open a slide by what its first bytes say. µm/px by the order of engine.slides.resolution.

    Raises: SlideError with the code `missing`, `no_permission`, `empty_file`, `not_a_slide`, `truncated`, `damaged`,
    `not_rgb`, `not_8_bit`, `unsupported`, `no_mpp` or `absurd_mpp`.
    """
    name = slide_name(path)
    levels = _open_levels(path, name)
    try:
        resolution = resolve(name, path.name, levels.claims, overrides or {}, mpp)
    except SlideError:
        levels.close()
        raise
    return Slide(name, path, levels, resolution)


def _open_levels(path: Path, name: str) -> Levels:
    try:
        if path.is_dir():
            return open_ngff(path, name)
        with path.open("rb") as file:
            head = file.read(8)
        if not head:
            raise SlideError("empty_file", f"{name}: {path} must hold a slide; it has 0 bytes. Copy it again.")
        return _opener(path, head)(path, name)
    except FileNotFoundError as error:
        raise SlideError(
            "missing", f"{name}: there must be a slide at {path}; there is nothing. Check the path."
        ) from error
    except PermissionError as error:
        raise SlideError(
            "no_permission", f"{name}: {path} must be readable by you ({error.strerror}). Allow it (chmod)."
        ) from error
    except OSError as error:
        raise SlideError("vanished", f"{name}: {path} cannot be read ({error.strerror}). Is its disk there?") from error


def _opener(path: Path, head: bytes) -> Callable[[Path, str], Levels]:
    """Choose who reads a file: for plain TIFF the faster (benchmarks/reading.py), OpenSlide where it knows more."""
    if head.startswith((picture.PNG, picture.JPEG)):
        return picture.open_picture
    maker = vendor.vendor_of(path)
    is_tiff = head.startswith(tiff.MAGIC)
    if is_tiff and (maker in (None, "generic-tiff") or (maker == "aperio" and tiff.suits_aperio(path))):
        return tiff.open_tiff
    if maker is None:
        raise SlideError(
            "not_a_slide",
            f"{path.name}: a slide must be a format of OpenSlide, TIFF, OME-Zarr, PNG or JPEG; it begins "
            f"with {head!r}.",
        )
    return vendor.open_vendor


class OpenSlides:
    """The slides one process has open: at most `limit`, the least used goes first. Safe in several threads."""

    def __init__(self, overrides: Overrides | None = None, mpp: float | None = None, limit: int = 8) -> None:
        self._overrides, self._mpp, self._limit = overrides, mpp, limit
        self._slides: OrderedDict[Path, Slide] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> Slide:
        """Return the slide at a path, open. Raises SlideError as `open_slide`."""
        with self._lock:
            if path not in self._slides:
                self._slides[path] = open_slide(path, self._overrides, self._mpp)
            self._slides.move_to_end(path)
            while len(self._slides) > self._limit:
                # Dropped, not closed: another thread may still read it. Its file closes with the last reader.
                self._slides.popitem(last=False)
            return self._slides[path]
