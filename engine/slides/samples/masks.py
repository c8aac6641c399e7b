"""Mask pages of a TIFF, and the mask file beside one: which px of a picture are there.

A mask has the size of a level, or another: then a px of the level is kept if all that lies under it is. A part of a
mask that cannot be decoded is damage, because nobody can tell what it kept. Reads are safe from several threads.
Source: TIFF 6.0 (TransparencyMask: 1 is kept), GDAL's masks (RFC 15).
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from engine.core.errors import UNREADABLE, SlideError
from engine.slides.backends.base import check_segment

_MASK_FILE = ".msk"
_MASK_BIT = 4
_PIECE_PX = 4096
"""Px of a mask on each axis that are held at once: 16 MB."""
_SAME_SHAPE = 0.01
"""A mask is of this picture if their height : width differ by less."""


def pictures_of(tiff: tifffile.TiffFile) -> list[Any]:
    """Return the series of a TIFF that are pictures: masks are none."""
    return [series for series in tiff.series if not is_mask(series.keyframe)]


def is_mask(page: Any) -> bool:
    """Whether a page is a mask by its photometric interpretation or by its subfile type."""
    return page.photometric == tifffile.PHOTOMETRIC.MASK or bool(int(page.subfiletype) & _MASK_BIT)


def masks_of(path: Path, name: str, size: tuple[int, int], tiff: tifffile.TiffFile) -> list["Mask"]:
    """Return the masks of the picture of a size (h, w), largest first: pages of the file, or of the .msk beside it."""
    pages = [page for page in _pages(tiff) if is_mask(page)]
    beside = path.with_name(path.name + _MASK_FILE)
    if not pages and beside.is_file():
        path = beside
        try:
            with tifffile.TiffFile(beside) as found:
                pages = list(_pages(found))
        except UNREADABLE as error:
            raise SlideError(
                "unsupported", f"{name}: {beside} must be its mask; it cannot be opened ({error}). Mend or remove it."
            ) from error
    if not pages:
        return []
    fitting = [p for p in pages if abs(p.imagelength / size[0] / (p.imagewidth / size[1]) - 1) < _SAME_SHAPE]
    odd = next((p for p in fitting if p.samplesperpixel != 1 or p.bitspersample not in (1, 8)), None)
    if not fitting or odd is not None:
        p = odd or pages[0]
        raise SlideError(
            "unsupported",
            f"{name}: a mask must have one sample of 1 or 8 bits and the shape of the picture, {size[1]}x{size[0]}; "
            f"that in {path.name} has {p.samplesperpixel} of {p.bitspersample} bits and {p.imagewidth}x{p.imagelength} "
            "px. Write it anew (gdal_translate -mask).",
        )
    fitting.sort(key=lambda p: -p.imagelength * p.imagewidth)
    return [Mask(path, name, page) for page in fitting]


def _pages(tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    """Yield pages and those below them. A frame shares the tags of its page, so that it is no mask of its own."""
    for page in tiff.pages:
        if isinstance(page, tifffile.TiffPage):
            yield page
            below: Iterable[Any] = page.pages or () if page.subifds else ()
            yield from (sub for sub in below if isinstance(sub, tifffile.TiffPage))


class Mask:
    """One mask; use `masks_of`."""

    def __init__(self, path: Path, name: str, page: Any) -> None:
        self.size = page.imagelength, page.imagewidth
        self._path, self._name = path, name
        self._rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        self._columns = page.tilewidth if page.is_tiled else page.imagewidth
        check_segment(name, (self._rows, self._columns))
        self._across = -(-page.imagewidth // self._columns)
        self._offsets, self._counts, self._decode = page.dataoffsets, page.databytecounts, page.decode
        if min(len(self._offsets), len(self._counts)) < -(-page.imagelength // self._rows) * self._across:
            raise ValueError(f"its mask lists {len(self._offsets)} parts, fewer than it has")
        self._tables = page.jpegtables
        self._fd = os.open(path, os.O_RDONLY)

    def window(
        self, size: tuple[int, int], y: int, x: int, h: int, w: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which px of a window of a level of a size (h, w) are kept, and where nobody knows: bool (h, w) each.

        Raises: SlideError `vanished`.
        """
        if size == self.size:
            return self._read(y, x, h, w)
        kept, broken = np.ones((h, w), np.bool_), np.zeros((h, w), np.bool_)
        scale = self.size[0] / size[0], self.size[1] / size[1]
        step = max(1, int(_PIECE_PX / max(scale)))
        for top in range(0, h, step):
            for left in range(0, w, step):
                rows, columns = min(step, h - top), min(step, w - left)
                where = np.s_[top : top + rows, left : left + columns]
                kept[where], broken[where] = self._scaled(scale, y + top, x + left, rows, columns)
        return kept, broken

    def _scaled(
        self, scale: tuple[float, float], y: int, x: int, h: int, w: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return a window in px of a level whose px have `scale` px (y, x) of this mask."""
        spans = [
            (at * s, min((at + n) * s, whole)) for at, n, s, whole in zip((y, x), (h, w), scale, self.size, strict=True)
        ]
        (y0, y1), (x0, x1) = ((math.floor(a + 1e-6), math.ceil(b - 1e-6)) for a, b in spans)
        kept, broken = self._read(y0, x0, y1 - y0, x1 - x0)
        box = (spans[1][0] - x0, spans[0][0] - y0, spans[1][1] - x0, spans[0][1] - y0)

        def share(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
            picture = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
            return np.asarray(picture.resize((w, h), Image.Resampling.BOX, box=box))

        return share(kept) == 255, share(broken) > 0

    def _read(self, y: int, x: int, h: int, w: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        kept, broken = np.zeros((h, w), np.bool_), np.zeros((h, w), np.bool_)
        for top in range(y // self._rows * self._rows, y + h, self._rows):
            for left in range(x // self._columns * self._columns, x + w, self._columns):
                index = top // self._rows * self._across + left // self._columns
                part = self._segment(index, min(self._rows, self.size[0] - top))
                y0, x0, y1, x1 = (
                    max(top, y),
                    max(left, x),
                    min(top + self._rows, y + h),
                    min(left + self._columns, x + w),
                )
                where = np.s_[y0 - y : y1 - y, x0 - x : x1 - x]
                if part is None:
                    broken[where] = kept[where] = True
                else:
                    kept[where] = part[y0 - top : y1 - top, x0 - left : x1 - left]
        return kept, broken

    def _segment(self, index: int, least: int) -> NDArray[np.bool_] | None:
        """Return a tile or strip of at least so many rows, None if it is damaged; one that was never written is 0."""
        count = int(self._counts[index])
        if not count:
            return np.zeros((self._rows, self._columns), np.bool_)
        try:
            data = os.pread(self._fd, count, int(self._offsets[index]))
        except OSError as error:
            raise SlideError(
                "vanished", f"{self._name}: {self._path} can no longer be read ({error.strerror}). Is its disk there?"
            ) from error
        try:
            pixels, _, _ = self._decode(data, index, jpegtables=self._tables)
        except UNREADABLE:
            return None
        if pixels is None or pixels.shape[1] < least or pixels.shape[2] < self._columns:
            return None
        return np.asarray(pixels[0, ..., 0] != 0)

    def close(self) -> None:
        """Give the file back; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()
