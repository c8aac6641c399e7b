"""Levels that are zarr arrays: OME-Zarr 0.4 and 0.5, and TIFF with one plane per colour (through tifffile).

A chunk that cannot be decoded is damaged. A chunk that is not there stands for its fill value by the Zarr
specification; unless that is white it is taken as absent, because a lost chunk looks the same. Reads are safe from
several threads. It does not know µm/px targets. Source: OME-NGFF 0.4, 0.5; Zarr 2, 3.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from engine.errors import UNREADABLE, SlideError
from engine.slides.backends.levels import Window, check_rgb, plausible_levels
from engine.slides.resolution import Claim, Claims, microns

WHITE = 255


def open_ngff(path: Path, name: str) -> "ArrayLevels":
    """Open an OME-Zarr folder. Raises SlideError `not_a_slide`, `not_rgb`, `not_8_bit` or `unsupported`."""
    try:
        group = zarr.open_group(LocalStore(path, read_only=True), mode="r")
        attributes: Any = group.attrs.asdict()
        scales = attributes.get("ome", attributes)["multiscales"][0]
        axes = [str(axis["name"]).lower() for axis in scales["axes"]]
        arrays = [group[dataset["path"]] for dataset in scales["datasets"]]
        claims = _claims(scales, axes)
        shape = arrays[0].shape
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
    check_rgb(name, channels, arrays[0].dtype.itemsize * 8, "RGB" if channels == 3 else "greyscale")
    return ArrayLevels(path, name, arrays, axes, claims, "zarr")


def _claims(scales: Any, axes: list[str]) -> Claims:
    """Return scale times unit; an axis without a unit has no known size."""
    dataset = scales["datasets"][0]
    steps = [*dataset["coordinateTransformations"], *scales.get("coordinateTransformations", [])]
    found = []
    for name in "xy":
        at = axes.index(name)
        size = float(np.prod([t["scale"][at] for t in steps if t["type"] == "scale"]))
        unit = scales["axes"][at].get("unit")
        found.append(microns(size, unit) if unit else None)
    if found[0] is None or found[1] is None:
        return Claims()
    return Claims((Claim("OME-NGFF scale", found[0], found[1]),))


class ArrayLevels:
    """Levels of zarr arrays with axes y and x, a colour axis of 3, and others of size 1."""

    def __init__(self, path: Path, name: str, arrays: list[Any], axes: list[str], claims: Claims, reader: str) -> None:
        """Use `open_ngff` or `of_tiff`."""
        at = axes.index("y"), axes.index("x")
        sizes = [(array.shape[at[0]], array.shape[at[1]]) for array in arrays]
        kept = plausible_levels(sizes)
        self.reader, self.claims = reader, claims
        self.sizes = tuple(sizes[i] for i in kept)
        self._path, self._name, self._axes = path, name, axes
        self._arrays = [arrays[i] for i in kept]
        self._file: tifffile.TiffFile | None = None

    @classmethod
    def of_tiff(cls, path: Path, name: str, series: int, claims: Claims) -> "ArrayLevels":
        """Open a series of axes C or S, Y, X of a TIFF that was found to be whole."""
        tiff = tifffile.TiffFile(path)
        found_series = tiff.series[series]
        count = len(found_series.levels)
        arrays: list[Any] = [zarr.open_array(found_series.aszarr(level=i), mode="r") for i in range(count)]
        found = cls(path, name, arrays, ["c", "y", "x"], claims, "tifffile")
        found._file = tiff
        return found

    def window(self, level: int, y: int, x: int, h: int, w: int) -> Window:
        """Return a window that lies inside the level."""
        array = self._arrays[level]
        window = Window.absent(h, w)
        rows, columns = (self._block(array)[self._axes.index(a)] for a in "yx")
        tops, lefts = range(y // rows * rows, y + h, rows), range(x // columns * columns, x + w, columns)
        blocks = list(itertools.product(tops, lefts))
        absent = [b for b in blocks if self._is_absent(array, *b)]
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

    def _is_absent(self, array: Any, y: int, x: int) -> bool:
        if not isinstance(array.store, LocalStore) or array.fill_value == WHITE:
            return False
        block = self._block(array)
        at = {"y": y // block[self._axes.index("y")], "x": x // block[self._axes.index("x")]}
        # Chunks of one colour are looked up by their first.
        key = array.metadata.encode_chunk_key(tuple(at.get(axis, 0) for axis in self._axes))
        if (self._path / array.path / key).exists():
            return False
        if not any((self._path / file).exists() for file in ("zarr.json", ".zattrs")):
            raise SlideError("vanished", f"{self._name}: {self._path} is no longer there. Is its disk mounted?")
        return True

    def _try(self, array: Any, y: int, x: int, h: int, w: int) -> NDArray[np.uint8] | None:
        where = {"y": slice(y, y + h), "x": slice(x, x + w), "c": slice(None)}
        try:
            block = np.asarray(array[tuple(where.get(axis, 0) for axis in self._axes)])
        except UNREADABLE:
            return None
        left = [axis for axis in self._axes if axis in where]
        return np.ascontiguousarray(block.transpose([left.index(axis) for axis in "yxc"]))
