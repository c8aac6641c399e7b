"""Levels that are zarr arrays: OME-Zarr 0.4 and 0.5, and TIFF with one plane per colour (through tifffile).

A chunk that cannot be decoded is damaged. A chunk that is not there stands for its fill value by the Zarr
specification; unless that is white it is taken as absent, because a lost chunk looks the same. Reads are safe from
several threads. It does not know µm/px targets. Source: OME-NGFF 0.4, 0.5; Zarr 2, 3.
"""

import itertools
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
import zarr.errors
from numpy.typing import NDArray
from zarr.storage import LocalStore

from engine.core.errors import UNREADABLE, SlideError
from engine.slides.backends.base import Window, check_rgb, check_segment, plausible_levels
from engine.slides.backends.choice import ONLY, Choice
from engine.slides.backends.ngff_layout import claims_beside, find_picture
from engine.slides.resolution import Claim, Claims
from engine.slides.samples.colours import check_channels, check_unsigned
from engine.slides.samples.validity import Samples, is_a_band, probes
from engine.slides.units import microns, number

WHITE = 255
RGB = Samples()


def open_ngff(path: Path, name: str, series: int | None = None) -> "ArrayLevels":
    """Open an OME-Zarr folder: its picture number `series`, else the largest that is no label.

    Raises: SlideError `not_a_slide`, `not_rgb`, `not_8_bit`, `no_such_series` or `unsupported`.
    """
    try:
        picture = find_picture(zarr.open_group(LocalStore(path, read_only=True), mode="r"), name, path, series)
        axes, arrays = picture.axes, picture.arrays
        claims = _claims(picture.scales, axes)
        shape = arrays[0].shape
        if not claims.mpp:
            claims = claims_beside(path, picture)
    except (*UNREADABLE, zarr.errors.BaseZarrError) as error:
        raise SlideError(
            "not_a_slide", f"{name}: {path} must be an OME-Zarr folder of version 0.4 or 0.5; {error!r}."
        ) from error
    if not {"y", "x"} <= set(axes) or any(n != 1 for a, n in zip(axes, shape, strict=True) if a not in "cyx"):
        raise SlideError(
            "unsupported",
            f"{name}: a slide must be one picture of axes c, y, x; it has {axes} of {shape}. Export one plane.",
        )
    channels = shape[axes.index("c")] if "c" in axes else 1
    is_colour = channels in (3, 4) or (channels > 4 and picture.is_rgb)
    kind = "RGB" if is_colour else "greyscale" if channels == 1 else "multichannel"
    check_rgb(name, channels, arrays[0].dtype.itemsize * 8, kind)
    check_unsigned(name, arrays[0].dtype)
    if channels == 3:
        for said in picture.channels:
            check_channels(name, said)
    samples = Samples(alpha=3) if channels == 4 else Samples(left_out=channels - 3)
    levels = ArrayLevels(path, name, arrays, axes, claims, "zarr", picture.choice, samples)
    if channels == 4 and levels.samples.alpha is None and not picture.is_rgb:
        raise SlideError(
            "not_rgb",
            f"{name}: of four channels the first three must be RGB and the last alpha; the last has the values of a "
            "stain or a band. Export RGB; or, if it is, name the channels' colours in omero (FF0000, 00FF00, 0000FF).",
        )
    return levels


def _claims(scales: Any, axes: list[str]) -> Claims:
    """Return scale times unit; an axis without a unit, or with more than a scale and a shift, has no known size."""
    dataset = scales["datasets"][0]
    steps = [*(dataset.get("coordinateTransformations") or []), *(scales.get("coordinateTransformations") or [])]
    found: list[float | None] = []
    for name in "xy":
        at = axes.index(name)
        size, factors = 1.0, [number(scale[at]) if len(scale) == len(axes) else None for scale in _scales(steps)]
        for factor in factors or [None]:
            size *= factor or math.nan
        found.append(microns(size, scales["axes"][at].get("unit")))
    x, y = (number(v) for v in found)
    return Claims(()) if x is None or y is None else Claims((Claim("OME-NGFF scale", x, y),))


def _scales(steps: list[Any]) -> list[Any]:
    """Return the scales among transformations: of one that is neither scale nor shift, none that can be used."""
    harmless = ("translation", "identity")
    return [step.get("scale") or () if step.get("type") == "scale" else () for step in steps
            if step.get("type") not in harmless]  # fmt: skip


def _holes(level: Any, planes: int) -> NDArray[np.bool_]:
    """Return which segments (rows, columns) of a TIFF's level lack one of the planes that are read."""
    pages = [page for page in level.pages if page is not None]
    counts = np.concatenate([np.asarray(page.databytecounts) for page in pages])
    page = level.keyframe
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    grid = -(-page.imagelength // rows), -(-page.imagewidth // columns)
    return (counts.reshape(-1, *grid)[:planes] == 0).any(axis=0)


class ArrayLevels:
    """Levels of zarr arrays with axes y and x, a colour axis of 3, and others of size 1."""

    def __init__(
        self, path: Path, name: str, arrays: list[Any], axes: list[str], claims: Claims, reader: str,
        choice: Choice = ONLY, samples: Samples = RGB,
    ) -> None:  # fmt: skip
        """Use `open_ngff` or `of_tiff`."""
        at = axes.index("y"), axes.index("x")
        sizes = [(array.shape[at[0]], array.shape[at[1]]) for array in arrays]
        kept = plausible_levels(sizes)
        self.reader, self.claims, self.choice = reader, claims, choice
        self.sizes = tuple(sizes[i] for i in kept)
        self._path, self._name, self._axes = path, name, axes
        for i in kept:
            check_segment(name, (arrays[i].chunks[at[0]], arrays[i].chunks[at[1]]))
        self._arrays, self._kept = [arrays[i] for i in kept], kept
        self._file: tifffile.TiffFile | None = None
        self._holes: list[NDArray[np.bool_]] = []
        self.samples = samples
        if samples.alpha is not None and self._alpha_is_a_band():
            self.samples = samples.without_alpha()
        self.reader += self.samples.said

    def _alpha_is_a_band(self) -> bool:
        """Whether what is called alpha has the values of a band, as near infrared has."""
        last, found = len(self._arrays) - 1, [np.zeros(0, np.uint8)]
        for place in probes(*self.sizes[last]):
            pixels = self._raw(self._arrays[last], *place)
            found += [] if pixels is None else [pixels[..., self.samples.alpha].ravel()]
        return is_a_band(np.concatenate(found))

    @classmethod
    def of_tiff(
        cls, path: Path, name: str, series: int, claims: Claims, choice: Choice, samples: Samples = RGB
    ) -> "ArrayLevels":
        """Open a series of axes C or S, Y, X of a TIFF that was found to be whole."""
        with ExitStack() as stack:
            tiff = stack.enter_context(tifffile.TiffFile(path))
            found_series = tiff.series[series]
            count = len(found_series.levels)
            arrays: list[Any] = [zarr.open_array(found_series.aszarr(level=i), mode="r") for i in range(count)]
            found = cls(path, name, arrays, ["c", "y", "x"], claims, "tifffile", choice, samples)
            found._file = tiff
            found._holes = [_holes(found_series.levels[i], found.samples.last) for i in found._kept]
            stack.pop_all()  # it stays open, unless something was raised
        return found

    def window(self, level: int, y: int, x: int, h: int, w: int) -> Window:
        """Return a window that lies inside the level."""
        array = self._arrays[level]
        window = Window.absent(h, w)
        rows, columns = (self._block(array)[self._axes.index(a)] for a in "yx")
        tops, lefts = range(y // rows * rows, y + h, rows), range(x // columns * columns, x + w, columns)
        blocks = list(itertools.product(tops, lefts))
        absent = [b for b in blocks if self._is_absent(level, *b)]
        whole = None if absent else self._try(array, y, x, h, w)
        if whole is not None:
            window.paint(0, 0, whole, (h, w))
            return window
        for top, left in blocks:
            if (top, left) in absent:
                continue
            y0, x0, y1, x1 = max(top, y), max(left, x), min(top + rows, y + h), min(left + columns, x + w)
            window.paint(y0 - y, x0 - x, self._try(array, y0, x0, y1 - y0, x1 - x0), (y1 - y0, x1 - x0))
        return window

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()

    @staticmethod
    def _block(array: Any) -> tuple[int, ...]:
        return array.shards or array.chunks

    def _is_absent(self, level: int, y: int, x: int) -> bool:
        """Whether a block was never written, or one of its colours."""
        array = self._arrays[level]
        block = dict(zip(self._axes, self._block(array), strict=True))
        row, column = y // block["y"], x // block["x"]
        if self._holes:
            return bool(self._holes[level][row, column])
        if array.fill_value == WHITE:
            return False
        for colour in range(-(-self.samples.last // block["c"])):
            at = {"y": row, "x": column, "c": colour}
            key = array.metadata.encode_chunk_key(tuple(at.get(axis, 0) for axis in self._axes))
            if not (self._path / array.path / key).exists():
                break
        else:
            return False
        if not any((self._path / file).exists() for file in ("zarr.json", ".zattrs", ".zgroup")):
            raise SlideError("vanished", f"{self._name}: {self._path} is no longer there. Is its disk mounted?")
        return True

    def _try(self, array: Any, y: int, x: int, h: int, w: int) -> NDArray[np.uint8] | None:
        pixels = self._raw(array, y, x, h, w)
        return None if pixels is None else self.samples.of(pixels)

    def _raw(self, array: Any, y: int, x: int, h: int, w: int) -> NDArray[np.uint8] | None:
        """Return (h, w, n): the samples that are needed, None if they cannot be decoded."""
        where = {"y": slice(y, y + h), "x": slice(x, x + w), "c": slice(0, self.samples.last)}
        try:
            block = np.asarray(array[tuple(where.get(axis, 0) for axis in self._axes)])
        except UNREADABLE:
            return None
        left = [axis for axis in self._axes if axis in where]
        return np.ascontiguousarray(block.transpose([left.index(axis) for axis in "yxc"]))
