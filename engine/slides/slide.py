"""A slide: its size, its µm/px and where they come from, and windows of it at any µm/px.

Invariant: a window covers exactly the field that was asked for, whatever the levels: it is cut from the coarsest
level that is fine enough, at a fraction of a px, and reduced once, with anti-aliasing. A px that the file does not
give is marked invalid. It does not know tissue, grids or models.

Threads may read one slide at once. A slide cannot be pickled: send its path and open it once per process
(`OpenSlides` keeps the last few open).
"""

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.core.errors import BagError, EngineError, SlideError
from engine.core.lazy import CHUNK_PX, file_stamp, opened
from engine.slides.backends import openslide, raster, tiff
from engine.slides.backends.base import GREY, Levels, Window, level_scale
from engine.slides.backends.memory import MemoryLevels
from engine.slides.backends.zarr import open_ngff
from engine.slides.folders import look_through
from engine.slides.lazy import Damaged, LazySlide
from engine.slides.resolution import Overrides, Resolution, check_mpp, resolve

if TYPE_CHECKING:
    import dask.array as da

log = logging.getLogger(__name__)
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
ARRAYS = "array"
"""The folder that slides made of arrays seem to lie in; they have no file."""


@dataclass(frozen=True)
class Region:
    """Pixels of a window of a slide."""

    pixels: NDArray[np.uint8]
    """(h, w, 3) RGB. Damaged px are grey (128), px that the file does not hold white: both are invalid."""
    valid: NDArray[np.bool_]
    """(h, w): all that went into the px came from the file, undamaged."""
    damaged: int
    """Blocks of the file under the window that could not be decoded."""
    lost: NDArray[np.bool_] | None = None
    """(h, w): something of what went into the px is damaged; None if nothing is."""


class Slide:
    """An open slide; use `open_slide`. Coordinates are level-0 px from the top left corner.

    >>> import engine, numpy as np
    >>> slide = engine.Slide.from_array(np.full((600, 800, 3), 160, np.uint8), mpp=0.25)
    >>> slide.height, slide.width, slide.resolution.mpp
    (600, 800, 0.25)
    >>> region = slide.read(x=100, y=100, w=64, h=64, mpp=0.5)
    >>> region.pixels.shape, bool(region.valid.all())
    ((64, 64, 3), True)
    """

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
        self.choice = levels.choice
        """Which picture of the file it is."""
        self._levels = levels

    @classmethod
    def from_array(cls, array: Any, *, mpp: float, name: str = "array") -> Self:
        """Return a slide of what another program made: registered, normalised, stitched; nothing is written.

        `array` is uint8 (h, w, 3) or (3, h, w), numpy or dask, or a list of such levels, finest first; `mpp` is the
        finest level's µm/px. It lives in this process: Ray's workers do not see it. Raises: EngineError for another
        array, µm/px or name.
        """
        check_slide_name(name)
        arrays = array if isinstance(array, list | tuple) else [array]
        resolution = Resolution(check_mpp(mpp, "mpp"), mpp, "given with the array")
        return cls(slide_name(Path(name)), Path(ARRAYS, name), MemoryLevels(name, arrays), resolution)

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
        pixels, valid = _reduce(window, down, across)
        lost = None
        if window.damaged:
            whole = window.valid | (window.pixels != GREY).any(axis=2)  # only damaged px are grey and invalid
            lost = ~_reduce(Window(window.pixels, whole), down, across)[1]
        return Region(pixels, valid, window.damaged, lost)

    def window(self, level: int, y: int, x: int, h: int, w: int) -> Region:
        """Return a window that lies inside a level, as the file has it; in whole px of that level.

        Raises: SlideError `vanished`; ValueError outside the level.
        """
        height, width = self.sizes[level]
        if not (0 <= y < y + h <= height and 0 <= x < x + w <= width):
            raise ValueError(
                f"a window must lie in {width}x{height} px of level {level}; got {w}x{h} px at x={x}, y={y}."
            )
        found = self._levels.window(level, y, x, h, w)
        return Region(found.pixels, found.valid, found.damaged)

    def dask(self, mpp: float = 0.5, chunks: int = CHUNK_PX, damaged: Damaged = "error") -> "da.Array":
        """Return the whole slide at `mpp` µm/px as a dask array: uint8 (3, h, w); a block is what `read` gives for it.

        Where the slide's px are no whole number of times finer, px at the rims of blocks differ by a grey level or so
        from those of other `chunks`. Raises: EngineError for a µm/px or chunks that are not positive; when computed,
        SlideError `damaged` for px that cannot be decoded (`damaged="grey"` gives them as 128), or `vanished`.
        """
        steps = self.field(1, check_mpp(mpp, "mpp"))
        width, height = (max(1, math.ceil(n / s - 1e-6)) for n, s in zip((self.width, self.height), steps, strict=True))
        return self._lazy(damaged).at(mpp, (height, width), chunks)

    def dask_levels(self, chunks: int = CHUNK_PX, damaged: Damaged = "error") -> "list[da.Array]":
        """Return the levels as they are stored, finest first, as dask arrays: uint8 (3, h, w). Raises: as `dask`."""
        lazy = self._lazy(damaged)
        return [lazy.level(number, size, chunks) for number, size in enumerate(self.sizes)]

    def _lazy(self, damaged: Damaged) -> LazySlide:
        if isinstance(self._levels, MemoryLevels):
            from dask.base import tokenize

            same = partial(Slide, self.name, self.path, self._levels, self.resolution)
            return LazySlide(same, (tokenize(*self._levels.arrays), self.resolution), damaged)
        mpp = self.resolution.mpp_x, self.resolution.mpp_y
        stamp, series = file_stamp(self.path), self.choice.index
        return LazySlide(partial(_reopened, self.path.absolute(), mpp, stamp, series), (*stamp, *mpp, series), damaged)

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

    Links to folders are followed, each real folder once; what cannot be looked through is logged as a warning.
    Raises: EngineError if there is no such folder or no slide in it.
    """
    if not folder.is_dir():
        raise EngineError(f"slides must be a folder; there is none at {folder}. Check the path.")
    seen = look_through(folder, lambda path: path.suffix.lower() in SLIDE_SUFFIXES)
    for line in seen.left_out:
        log.warning("left out: %s", line)
    if not seen.paths:
        more = f" Left out: {'; '.join(seen.left_out)}." if seen.left_out else ""
        endings = ", ".join(SLIDE_SUFFIXES)
        raise EngineError(f"{folder} must hold slides ({endings}); it holds none. Check the path.{more}")
    return sorted(seen.paths, key=lambda p: (slide_name(p), str(p)))


def open_slide(
    path: str | Path, overrides: Overrides | None = None, mpp: float | None = None, series: int | None = None
) -> Slide:
    """Open a slide by what its first bytes say. µm/px by the order of engine.slides.resolution.

    Of a file that holds several pictures, `series` is the number of the one to read; None takes the largest that is no
    label, macro or overview. Px and µm/px are those of that picture.
    Raises: SlideError with the code `missing`, `no_permission`, `empty_file`, `not_a_slide`, `truncated`, `damaged`,
    `not_rgb`, `not_8_bit`, `unsupported`, `no_such_series`, `no_mpp` or `absurd_mpp`.

    >>> import engine, PIL.Image
    >>> PIL.Image.new("RGB", (800, 600), "white").save("slide.png")
    >>> with engine.open_slide("slide.png", mpp=0.5) as slide:
    ...     slide.name, slide.width, slide.read(x=-10, y=0, w=256, h=256, mpp=1.0).pixels.shape
    ('slide', 800, (256, 256, 3))
    """
    path = Path(path)
    name = slide_name(path)
    levels = _open_levels(path, name, series)
    try:
        resolution = resolve(name, path.name, levels.claims, overrides or {}, mpp)
    except SlideError:
        levels.close()
        raise
    if levels.choice.doubtful or levels.choice.index:
        resolution = replace(resolution, source=f"{resolution.source}, series {levels.choice.index}")
    return Slide(name, path, levels, resolution)


def _reopened(path: Path, mpp: tuple[float, float], stamp: tuple[str, int, int], series: int | None) -> Slide:
    """Return a slide in the process that computes, at the µm/px it was first opened with. Raises: SlideError."""
    return opened(("slide", mpp, stamp, series), lambda: open_slide(path, {path.name: mpp}, series=series))


def _open_levels(path: Path, name: str, series: int | None) -> Levels:
    try:
        if path.is_dir():
            return open_ngff(path, name, series)
        with path.open("rb") as file:
            head = file.read(8)
        if not head:
            raise SlideError("empty_file", f"{name}: {path} must hold a slide; it has 0 bytes. Copy it again.")
        return _opener(path, head)(path, name, series)
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


def _opener(path: Path, head: bytes) -> Callable[[Path, str, int | None], Levels]:
    """Choose who reads a file: for plain TIFF ours (benchmarks.features.reading), OpenSlide where it knows more."""
    if head.startswith((raster.PNG, raster.JPEG)):
        return raster.open_picture
    maker = openslide.vendor_of(path)
    is_tiff = head.startswith(tiff.MAGIC)
    if is_tiff and (maker in (None, "generic-tiff") or (maker == "aperio" and tiff.suits_aperio(path))):
        return tiff.open_tiff
    if maker is None:
        raise SlideError(
            "not_a_slide",
            f"{path.name}: a slide must be a format of OpenSlide, TIFF, OME-Zarr, PNG or JPEG; it begins "
            f"with {head!r}.",
        )
    return openslide.open_vendor


class OpenSlides:
    """The slides one process has open: at most `limit`, the least used goes first. Safe in several threads."""

    def __init__(
        self, overrides: Overrides | None = None, mpp: float | None = None, limit: int = 8, series: int | None = None,
        given: Sequence[Slide] = (),
    ) -> None:  # fmt: skip
        """`given` are slides that are open already, such as those of arrays; they stay."""
        self._overrides, self._mpp, self._limit, self._series = overrides, mpp, limit, series
        self._given = {slide.path: slide for slide in given}
        self._slides: OrderedDict[Path, Slide] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> Slide:
        """Return the slide at a path, open. Raises SlideError as `open_slide`."""
        if path in self._given:
            return self._given[path]
        with self._lock:
            if path not in self._slides:
                self._slides[path] = open_slide(path, self._overrides, self._mpp, self._series)
            self._slides.move_to_end(path)
            while len(self._slides) > self._limit:
                # Dropped, not closed: another thread may still read it. Its file closes with the last reader.
                self._slides.popitem(last=False)
            return self._slides[path]


_LONGEST_NAME = 200
"""Bytes of a slide's name: file systems allow 255, and ".h5.partial" and TRIDENT's "_patches.h5" are put behind it."""


def check_slide_name(name: str) -> None:
    """Refuse a name whose files would leave the output folder or not be found again. Raises BagError."""
    if not name or name.startswith(".") or set(name) & {"/", "\\", "\0"} or not name.isprintable():
        raise BagError(f"a slide's name must be one visible file name without folders; got {name!r}. Rename the slide.")
    if len(name.encode()) > _LONGEST_NAME:
        raise BagError(f"a slide's name must fit into {_LONGEST_NAME} bytes; got {name[:60]!r}… Rename the slide.")
