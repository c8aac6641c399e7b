"""Streams that end too early: those that lack no px are mended, those whose decoder would paint on are told.

Invariant: nothing is made up; a stream is mended only by what follows from the bytes that are there (an end marker, a
checksum), and the decoder then judges it anew. Sources: ISO 15444-1 (annex A), RFC 1950, ISO 29199-2 (annex A).
"""

import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from engine.slides.samples.colours import JPEG_2000

JPEG_XR = frozenset({22610, 34934})
_DEFLATE = frozenset({8, 32946})
_END = b"\xff\xd9"


def strict_jpeg(data: bytes) -> NDArray[np.uint8]:
    """Decode JPEG to RGB (h, w, 3); a stream that lacks its end marker alone is whole. Raises ValueError."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        if _END in data[-16:]:  # padding may follow
            raise
        return simplejpeg.decode_jpeg(data.removesuffix(_END[:1]) + _END, "RGB", strict=True)


def is_whole_jpeg(data: bytes, tables: bytes | None = None) -> bool:
    """Whether a JPEG of four components, with the tables of its file, decodes without a warning."""
    if tables:
        data = tables[:-2] + data[2:]
    for end in (b"", _END):
        try:
            simplejpeg.decode_jpeg(data + end, "CMYK", strict=True)
        except ValueError:
            continue
        return True
    return False


def with_end(compression: int, data: bytes) -> bytes | None:
    """Return a stream with the end it lacks; None if it lacks none or cannot be mended.

    JPEG 2000 gets its end marker, deflate its checksum.
    """
    if compression in JPEG_2000 and not data.endswith(_END):
        return data.removesuffix(_END[:1]) + _END
    if compression in _DEFLATE:
        unpack = zlib.decompressobj()
        try:
            plain = unpack.decompress(data)
        except zlib.error:
            return None
        return None if unpack.eof else zlib.compress(plain, 0)
    return None


def is_whole_jpeg_xr(data: bytes) -> bool:
    """Whether a JPEG XR file is as long as its directory says; its decoder paints on where it ends."""
    where = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[where : where + 2], "little")
    tags = {}
    for at in range(where + 2, where + 2 + 12 * count, 12):
        tags[int.from_bytes(data[at : at + 2], "little")] = int.from_bytes(data[at + 8 : at + 12], "little")
    colour = tags.get(0xBCC0, 0) + tags.get(0xBCC1, 0)
    alpha, size = tags.get(0xBCC2, 0), tags.get(0xBCC3, 0)
    # jxrlib writes where the alpha ends, instead of how long it is.
    return 0 < colour <= len(data) and (size if size > alpha else alpha + size) <= len(data)
