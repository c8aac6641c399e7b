"""Tiled or striped TIFF (generic, OME, Aperio SVS): tifffile finds the segments, they are read and decoded here.

Invariant: a segment that a strict decoder refuses is damaged, even where a forgiving one would paint something.
Tolerant JPEG decoders turn a broken stream into grey or shifted blocks and say nothing; libjpeg-turbo with warnings
as errors (simplejpeg) notices most breaks: all cut streams, 98 % of the overwritten, 89 % of the zeroed and 20 % of
single flipped bits, which mostly change little; tifffile 0, 54, 0 and 1 % (benchmarks/features/reading.py).
The file is held open and read by position
(`pread`), so threads share it and a file that is unlinked meanwhile stays readable. It does not know µm/px targets.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from engine.core.errors import UNREADABLE, SlideError
from engine.slides.backends.base import MAX_SEGMENT_PX, Levels, Window, check_rgb, plausible_levels
from engine.slides.backends.choice import Choice
from engine.slides.backends.tiff_pictures import channels_of, choose_series, claims_of
from engine.slides.backends.zarr import ArrayLevels
from engine.slides.resolution import Claims
from engine.slides.samples.colours import (
    APERIO_JPEG_2000,
    JPEGS,
    Colours,
    check_aperio,
    check_planes,
    check_unsigned,
    colours_of,
    decompress,
    kind_of,
)
from engine.slides.samples.cut_streams import JPEG_XR, is_whole_jpeg, is_whole_jpeg_xr, strict_jpeg, with_end
from engine.slides.samples.validity import Samples, is_a_band, probes, samples_of, with_validity

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OLD_JPEG, _START = 6, b"\xff\xd8"


def suits_aperio(path: Path) -> bool:
    """Whether an SVS file is read here: but for Aperio's own JPEG 2000, whose subsampled YCbCr OpenSlide converts.

    Raises: SlideError `not_rgb` if such a file contradicts itself, which OpenSlide does not look at.
    """
    with tifffile.TiffFile(path) as tiff:
        pages = [level.keyframe for level in tiff.series[0].levels]
        if not any(int(page.compression) in APERIO_JPEG_2000 for page in pages):
            return True
        page = pages[0]
        there = np.flatnonzero(page.databytecounts)[:1]
        for i in there:
            check_aperio(path.name, page, _at(tiff, int(page.dataoffsets[i]), int(page.databytecounts[i])))
        return False


def open_tiff(path: Path, name: str, series: int | None = None, largest: int | None = None) -> Levels:
    """Open one picture of a TIFF: number `series`, else its largest that is no label. `largest` px per segment are
    decoded, MAX_SEGMENT_PX unless given.

    Raises: SlideError `not_a_slide`, `truncated`, `not_rgb`, `not_8_bit`, `no_such_series` or `unsupported`.
    """
    try:
        tiff = tifffile.TiffFile(path)
    except UNREADABLE as error:
        raise SlideError("not_a_slide", f"{name}: {path} must be a TIFF; it cannot be opened ({error}).") from error
    try:
        return _open_series(path, name, tiff, series, MAX_SEGMENT_PX if largest is None else largest)
    except UNREADABLE as error:
        raise SlideError("not_a_slide", f"{name}: the header of {path} is damaged ({error}). Copy it again.") from error
    finally:
        tiff.close()


def _open_series(path: Path, name: str, tiff: tifffile.TiffFile, wanted: int | None, largest: int) -> Levels:
    series, choice = choose_series(tiff, name, wanted)
    page = series.keyframe
    _check_whole(name, tiff)
    levels = [level for level in series.levels if len(level.pages) == 1]
    claims = claims_of(tiff, series)
    if series.axes in ("SYX", "CYX"):  # one plane per colour
        planes = int(series.shape[0])
        if planes == 3:
            check_planes(name, page, channels_of(tiff, series))
        else:
            check_rgb(name, planes, page.bitspersample, kind_of(page))
            check_unsigned(name, page.dtype)
        if int(page.compression) in JPEGS | JPEG_XR:
            raise SlideError(
                "unsupported",
                f"{name}: planes must be stored in a form whose damage is noticed; they are {page.compression!s}. "
                "Write px together (for instance vips tiffsave --tile --pyramid).",
            )
        at = tiff.series.index(series)
        found = ArrayLevels.of_tiff(path, name, at, claims, choice, samples_of(page, planes))
        return with_validity(path, name, found, tiff, page)
    if series.axes != "YXS" or not levels:
        check_rgb(name, page.samplesperpixel, page.bitspersample, kind_of(page))
        raise SlideError(
            "unsupported",
            f"{name}: a slide must be one picture of axes YXS; its axes are {series.axes}. Export one plane.",
        )
    pages: list[Any] = [level.keyframe for level in levels]
    kept = plausible_levels([(p.imagelength, p.imagewidth) for p in pages])
    for i in kept:
        if int(np.prod(_segment_shape(pages[i]))) > largest:
            raise SlideError(
                "unsupported",
                f"{name}: its px must lie in tiles or strips of at most {largest} px; one has "
                f"{_segment_shape(pages[i])}. Write it in tiles (for instance vips tiffsave --tile --pyramid).",
            )
    found = TiffLevels(path, name, [pages[i] for i in kept], claims, choice, tiff.is_ome)
    return with_validity(path, name, found, tiff, page)


def _check_whole(name: str, tiff: tifffile.TiffFile) -> None:
    """Refuse a file that ends before its last segment or its last page. Raises SlideError `truncated`."""
    size = tiff.filehandle.size
    count = len(tiff.pages)
    pages = [page for series in tiff.series for level in series.levels for page in level.pages if page is not None]
    ends = [int(np.add(p.dataoffsets, p.databytecounts).max()) for p in pages if len(p.dataoffsets)]
    pointer = tiff.pages.next_page_offset  # where the offset of the next page stands; 0 there ends the chain
    wanted = int.from_bytes(_at(tiff, pointer, tiff.tiff.offsetsize), _order(tiff)) if pointer else 0
    if max(ends, default=0) > size or wanted:
        raise SlideError(
            "truncated",
            f"{name}: the file must hold all of its px; it ends at byte {size} after {count} page(s), its parts reach "
            f"byte {max([*ends, wanted])}. Copy it again.",
        )


def _at(tiff: tifffile.TiffFile, offset: int, count: int) -> bytes:
    tiff.filehandle.seek(offset)
    return tiff.filehandle.read(count)


def _order(tiff: tifffile.TiffFile) -> Any:
    return "little" if tiff.byteorder == "<" else "big"


class TiffLevels:
    """Levels whose RGB segments lie in one file; safe to read from several threads."""

    reader = "tifffile"

    def __init__(
        self, path: Path, name: str, pages: list[Any], claims: Claims, choice: Choice, is_ome: bool = False
    ) -> None:  # fmt: skip
        """Use `open_tiff`. A reduced level whose colours cannot be read is left out: the one above it has its px."""
        self.claims, self.choice = claims, choice
        self._name, self._path = name, path
        self._fd = os.open(path, os.O_RDONLY)
        self._segments: list[_Segments] = []
        sizes = []
        for number, page in enumerate(pages):
            try:
                colours = colours_of(name, page, partial(self._first_of, page), is_ome)
            except SlideError:
                if number == 0:
                    raise
                continue
            self._segments.append(_Segments(page, self._read, colours))
            sizes.append((page.imagelength, page.imagewidth))
        self.sizes = tuple(sizes)
        if self._segments[-1].alpha_is_a_band(self.sizes[-1]):
            for segments in self._segments:
                segments.samples = segments.samples.without_alpha()
        self.reader += self._segments[0].samples.said

    def window(self, level: int, y: int, x: int, h: int, w: int) -> Window:
        """Return a window that lies inside the level."""
        window = Window.absent(h, w)
        for top, left, index in self._segments[level].under(y, x, h, w):
            self._segments[level].paint(window, top - y, left - x, index)
        return window

    def close(self) -> None:
        """Give the file back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    def _first_of(self, page: Any) -> bytes:
        """Return the bytes of a page's first segment that has any; none if there is none."""
        there = np.flatnonzero(page.databytecounts)
        return self._read(page.dataoffsets[there[0]], page.databytecounts[there[0]]) if len(there) else b""

    def _read(self, offset: int, count: int) -> bytes:
        try:
            data = os.pread(self._fd, count, offset)
        except OSError as error:
            raise SlideError(
                "vanished", f"{self._name}: {self._path} can no longer be read ({error.strerror}). Is its disk there?"
            ) from error
        if len(data) < count:
            raise SlideError("vanished", f"{self._name}: {self._path} became shorter while it was read. Copy it again.")
        return data


def _segment_shape(page: Any) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


class _Segments:
    """The tiles or strips of one page."""

    def __init__(self, page: Any, read: Any, colours: Colours) -> None:
        self.shape = _segment_shape(page)
        self._page, self._colours = page, colours
        if colours.ycbcr is not None and colours.subsampling == (1, 1):
            page.subsampling = (1, 1)  # tifffile takes YCbCr without the tag for subsampled, and refuses it
        self._columns = -(-page.imagewidth // self.shape[1])
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        if min(len(self._offsets), len(self._counts)) < -(-page.imagelength // self.shape[0]) * self._columns:
            raise ValueError(f"it lists {len(self._offsets)} tiles or strips, fewer than its size needs")
        self._decode_segment, self._tables = page.decode, page.jpegtables
        self._read = read
        self._is_tiled, self._height = bool(page.is_tiled), page.imagelength
        self.samples = samples_of(page, page.samplesperpixel)
        self._is_jpeg = int(page.compression) in JPEGS and page.samplesperpixel == 3
        if int(page.compression) == _OLD_JPEG:  # some hold whole streams, others pieces that tags put together
            there = np.flatnonzero(self._counts)[:1]
            self._is_jpeg &= all(read(int(self._offsets[i]), 2) == _START for i in there)
        self._head = self._jpeg_head(page) if self._is_jpeg else b""
        self._strict_colours = self._is_jpeg and self._colours_agree()

    @staticmethod
    def _jpeg_head(page: Any) -> bytes:
        """Return what goes before a segment's own markers: the shared tables, and whether RGB was made YCbCr.

        TIFF says that in a tag, a JPEG decoder looks for Adobe's marker.
        """
        transform = 0 if tifffile.PHOTOMETRIC(page.photometric).name == "RGB" else 1
        adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
        return _START + (page.jpegtables[2:-2] if page.jpegtables else b"") + adobe

    def _colours_agree(self) -> bool:
        """Whether the strict decoder reads the colours as tifffile does; a stray marker may mislead it."""
        for index in np.argsort(self._counts)[::-1][:4]:  # the largest hold most colour
            data = self._read(int(self._offsets[index]), int(self._counts[index]))
            strict = self._strictly(data, int(index))
            if strict is not None:
                theirs = self._as_tifffile(data, int(index))
                return theirs is not None and bool(np.abs(strict.astype(np.int16) - theirs).max() <= 2)
        return True

    def alpha_is_a_band(self, size: tuple[int, int]) -> bool:
        """Whether what the page of a size (h, w) calls alpha has the values of a band."""
        if self.samples.alpha is None:
            return False
        raw, found = Samples(self.samples.alpha), [np.zeros(0, np.uint8)]
        for index in sorted({i for probe in probes(*size) for _, _, i in self.under(*probe)}):
            if self._counts[index]:
                data = self._read(int(self._offsets[index]), int(self._counts[index]))
                pixels = self._as_tifffile(data, index, raw)
                found += [] if pixels is None else [pixels[..., 3].ravel()]
        return is_a_band(np.concatenate(found))

    def under(self, y: int, x: int, h: int, w: int) -> Iterator[tuple[int, int, int]]:
        """Yield (top, left, number) of the segments under a window."""
        rows, columns = self.shape
        for top in range(y // rows * rows, y + h, rows):
            for left in range(x // columns * columns, x + w, columns):
                yield top, left, top // rows * self._columns + left // columns

    def paint(self, window: Window, y: int, x: int, index: int) -> None:
        """Decode one segment onto a window; a segment of no bytes was never written."""
        count = self._counts[index]
        if count:
            pixels = self._decode(self._read(self._offsets[index], count), index)
            window.paint(y, x, pixels, self._size(index))

    def _size(self, index: int) -> tuple[int, int]:
        """Return (h, w) of a segment: tiles are whole, the last strip holds the rows that are left."""
        rows, columns = self.shape
        top = index // self._columns * rows
        return (rows if self._is_tiled else min(rows, self._height - top)), columns

    def _decode(self, data: bytes, index: int) -> NDArray[np.uint8] | None:
        pixels = self._strictly(data, index) if self._is_jpeg else self._as_tifffile(data, index)
        if pixels is None or not self._is_jpeg or self._strict_colours:
            return pixels
        return self._as_tifffile(data, index)

    def _strictly(self, data: bytes, index: int) -> NDArray[np.uint8] | None:
        """Decode JPEG, None if anything is wrong with it; a stream that lacks its end marker alone is whole."""
        if data[:2] != _START:
            return None
        data = self._head + data[2:]
        try:
            if simplejpeg.decode_jpeg_header(data)[:2] != self._size(index):
                return None
            return strict_jpeg(data)
        except ValueError:
            return None

    def _as_tifffile(self, data: bytes, index: int, samples: Samples | None = None) -> NDArray[np.uint8] | None:
        compression = int(self._page.compression)
        if compression in JPEG_XR and not is_whole_jpeg_xr(data):
            return None
        if compression in JPEGS and self._page.samplesperpixel == 4 and not is_whole_jpeg(data, self._tables):
            return None
        raw = self._samples_of(data, index)
        if raw is None and (mended := with_end(compression, data)) is not None:
            raw = self._samples_of(mended, index)
        return None if raw is None else self._colours.to_rgb((samples or self.samples).of(raw))

    def _samples_of(self, data: bytes, index: int) -> NDArray[np.uint8] | None:
        size = self._size(index)
        try:
            if self._colours.subsampling != (1, 1):
                return self._colours.unpack(decompress(self._page, data), *size)
            pixels, _, _ = self._decode_segment(data, index, jpegtables=self._tables)
        except UNREADABLE:
            return None
        right = pixels is not None and pixels.shape[1:3] == size
        return pixels[0] if right else None  # type: ignore[index]
