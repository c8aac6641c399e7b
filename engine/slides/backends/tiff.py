"""Tiled or striped TIFF (generic, OME, Aperio SVS): tifffile finds the segments, they are read and decoded here.

Invariant: a segment that a strict decoder refuses is damaged, even where a forgiving one would paint something.
Tolerant JPEG decoders turn a broken stream into grey or shifted blocks and say nothing; libjpeg-turbo with warnings
as errors (simplejpeg) notices most breaks: all cut streams, 98 % of the overwritten, 89 % of the zeroed and 20 % of
single flipped bits, which mostly change little; tifffile 0, 54, 0 and 1 % (benchmarks/reading.py).
The file is held open and read by position
(`pread`), so threads share it and a file that is unlinked meanwhile stays readable. It does not know µm/px targets.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from engine.errors import UNREADABLE, SlideError
from engine.slides.backends.arrays import ArrayLevels
from engine.slides.backends.levels import Levels, Window, check_rgb, plausible_levels
from engine.slides.resolution import Claim, Claims, geotiff_claim, ome_xml_claims, parse_number, tiff_claim

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_SEGMENT_PX = 2**26
"""A strip or tile is decoded whole: 200 MB. Larger ones make a slide unreadable in bounded memory."""
_JPEG, _START = 7, b"\xff\xd8"
_APERIO_CODECS = frozenset({1, 5, 7, 8, 32946})
"""None, LZW, JPEG, deflate. Aperio's own JPEG 2000 (33003, 33005) goes to OpenSlide, which knows its colours."""


def suits_aperio(path: Path) -> bool:
    """Whether an SVS file is of a kind that is read here."""
    with tifffile.TiffFile(path) as tiff:
        return int(tiff.pages.first.compression) in _APERIO_CODECS


def open_tiff(path: Path, name: str) -> Levels:
    """Open a TIFF. Raises SlideError `not_a_slide`, `truncated`, `not_rgb`, `not_8_bit` or `unsupported`."""
    try:
        tiff = tifffile.TiffFile(path)
    except UNREADABLE as error:
        raise SlideError("not_a_slide", f"{name}: {path} must be a TIFF; it cannot be opened ({error}).") from error
    try:
        return _open_series(path, name, tiff)
    except UNREADABLE as error:
        raise SlideError("not_a_slide", f"{name}: the header of {path} is damaged ({error}). Copy it again.") from error
    finally:
        tiff.close()


def _open_series(path: Path, name: str, tiff: tifffile.TiffFile) -> Levels:
    series = max(tiff.series, key=lambda s: s.keyframe.imagelength * s.keyframe.imagewidth)
    page = series.keyframe
    _check_whole(name, tiff)
    levels = [level for level in series.levels if len(level.pages) == 1]
    claims = _claims(tiff, series.pages[0] or page)
    kind = tifffile.PHOTOMETRIC(page.photometric).name
    if series.axes in ("SYX", "CYX") and series.shape[0] == 3:  # one plane per colour
        check_rgb(name, 3, page.bitspersample, "RGB")
        return ArrayLevels.of_tiff(path, name, tiff.series.index(series), claims)
    check_rgb(name, page.samplesperpixel, page.bitspersample, kind)
    if series.axes != "YXS" or not levels:
        raise SlideError(
            "unsupported",
            f"{name}: a slide must be one picture of axes YXS; its axes are {series.axes}. Export one plane.",
        )
    pages: list[Any] = [level.keyframe for level in levels]
    kept = plausible_levels([(p.imagelength, p.imagewidth) for p in pages])
    return TiffLevels(path, name, [pages[i] for i in kept], claims)


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


def _claims(tiff: tifffile.TiffFile, page: Any) -> Claims:
    claims: list[Claim] = []
    objective = None
    if page.description.startswith("Aperio"):
        said = dict(part.split("=", 1) for part in page.description.split("|") if "=" in part)
        said = {key.strip(): value.strip() for key, value in said.items()}
        mpp, objective = parse_number(said.get("MPP")), parse_number(said.get("AppMag"))
        claims += [Claim("aperio.MPP", mpp, mpp)] if mpp else []
    if tiff.ome_metadata:
        ome = ome_xml_claims(tiff.ome_metadata)
        claims += ome.mpp
        objective = objective or ome.objective
    tags = [page.tags.get(key) for key in ("XResolution", "YResolution", "ResolutionUnit")]
    x, y, unit = (tag.value if tag is not None else None for tag in tags)
    # TIFF 6.0: no unit given is inch
    claims += [c for c in (geotiff_claim(page.geotiff_tags), tiff_claim(x, y, int(unit or 2))) if c is not None]
    return Claims(tuple(claims), objective)


class TiffLevels:
    """Levels whose RGB segments lie in one file; safe to read from several threads."""

    reader = "tifffile"

    def __init__(self, path: Path, name: str, pages: list[Any], claims: Claims) -> None:
        """Use `open_tiff`."""
        self.claims = claims
        self.sizes = tuple((p.imagelength, p.imagewidth) for p in pages)
        self._name, self._path = name, path
        for page in pages:
            if int(np.prod(_segment_shape(page))) > MAX_SEGMENT_PX:
                raise SlideError(
                    "unsupported",
                    f"{name}: its px must lie in tiles or strips of at most {MAX_SEGMENT_PX} px; one has "
                    f"{_segment_shape(page)}. Write it in tiles (for instance vips tiffsave --tile --pyramid).",
                )
        self._fd = os.open(path, os.O_RDONLY)
        self._segments = [_Segments(page, self._read) for page in pages]

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

    def __init__(self, page: Any, read: Any) -> None:
        self.shape = _segment_shape(page)
        self._columns = -(-page.imagewidth // self.shape[1])
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        self._decode_segment, self._tables = page.decode, page.jpegtables
        self._read = read
        self._is_tiled, self._height = bool(page.is_tiled), page.imagelength
        # A fourth sample that is said to be no alpha (near infrared) is left out.
        self._samples = 3 if tuple(page.extrasamples) == (tifffile.EXTRASAMPLE.UNSPECIFIED,) else page.samplesperpixel
        self._is_jpeg = int(page.compression) == _JPEG and page.samplesperpixel == 3
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
        """Decode JPEG, None if anything is wrong with it."""
        if data[:2] != _START:
            return None
        data = self._head + data[2:]
        try:
            if simplejpeg.decode_jpeg_header(data)[:2] != self._size(index):
                return None
            return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except ValueError:
            return None

    def _as_tifffile(self, data: bytes, index: int) -> NDArray[np.uint8] | None:
        try:
            pixels, _, _ = self._decode_segment(data, index, jpegtables=self._tables)
        except UNREADABLE:
            return None
        right = pixels is not None and pixels.shape[1:3] == self._size(index)
        return pixels[0, ..., : self._samples] if right else None  # type: ignore[index]
