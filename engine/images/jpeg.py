"""JPEG: the whole picture or a crop, streamed, with µm/px and provenance in EXIF.

A JPEG may be cut at restart markers, where the encoder forgets what came before. So each row of chunks is encoded by
itself with a marker after every row of blocks, and the scans are put behind one another; the bytes are those of one
encoding of the whole. Source: ITU-T T.81, B.2 and E.1.4.
"""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from PIL.TiffImagePlugin import IFDRational

from engine.core.files import replacing
from engine.images.ome_zarr import CHUNK_PX
from engine.images.pyramid import Picture, label, resolution, strips

JPEG_LIMIT_PX = 65500
"""Longest edge: the format has 16 bits, and libjpeg, which nearly all readers use, stops a little below."""
_BLOCK_PX = 16
"""Rows and columns encoded together when colours have half the resolution."""
_EXIF_DESCRIPTION, _EXIF_X, _EXIF_Y, _EXIF_UNIT, _EXIF_SOFTWARE = 270, 282, 283, 296, 305
_CENTIMETRE = 3
_FRAME, _SCAN = 0xC0, 0xDA
_LAST_RESTART, _END = b"\xff\xd7", b"\xff\xd9"
# Markers count to 8 and start again. After this many rows of blocks the next one is number 7 and the count is through.
assert CHUNK_PX // _BLOCK_PX % 8 == 0


def check_jpeg(height: int, width: int) -> None:
    """Refuse a JPEG that readers cannot open. Raises ValueError."""
    if max(height, width) > JPEG_LIMIT_PX:
        raise ValueError(
            f"a JPEG must have at most {JPEG_LIMIT_PX} px per edge; the picture has {height} x {width}. Export a "
            "region, a smaller level, or use tiff."
        )


def write_jpeg(path: Path, picture: Picture, quality: int = 90) -> None:
    """Write level 0 as baseline JPEG, colours at half the resolution; memory holds one row of chunks.

    Raises: ValueError above 65500 px; CanvasError if the disk refuses or the picture is damaged.
    """
    height, width = picture.sizes[0]
    check_jpeg(height, width)
    exif = _exif(picture)
    with replacing(path, needed=height * width) as partial, partial.open("wb") as file:
        for number, rows in enumerate(strips(picture)):
            head, scan = _split(encode(rows, quality, b"" if number else exif))
            file.write(_LAST_RESTART if number else _with_height(head, height))
            file.write(scan)
        file.write(_END)


def encode(pixels: np.ndarray, quality: int, exif: bytes = b"") -> bytes:
    """Return uint8 (n, w, 3) as a JPEG with a restart marker after every row of blocks."""
    buffer = io.BytesIO()
    # The standard Huffman tables, because strips share one header.
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(
        buffer, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_rows=1, optimize=False, exif=exif
    )
    return buffer.getvalue()


def _exif(picture: Picture) -> bytes:
    per_cm = IFDRational(*resolution(picture.mpp_um))
    exif = PIL.Image.Exif()
    exif[_EXIF_DESCRIPTION] = label(picture)
    exif[_EXIF_X] = exif[_EXIF_Y] = per_cm
    exif[_EXIF_UNIT] = _CENTIMETRE
    exif[_EXIF_SOFTWARE] = "zoomldm-engine"
    return exif.tobytes()


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment between the start of the file and the scan's data."""
    at = 2
    while True:
        marker, (length,) = data[at + 1], struct.unpack(">H", data[at + 2 : at + 4])
        yield marker, at, at + 2 + length
        if marker == _SCAN:
            return
        at += 2 + length


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Return what stands before the scan's data, and the data without the end marker."""
    *_, (_, _, end) = _segments(data)
    return data[:end], data[end : -len(_END)]


def _with_height(head: bytes, height: int) -> bytes:
    start = next(start for marker, start, _ in _segments(head) if marker == _FRAME)
    at = start + 5  # after marker, length and bit depth
    return head[:at] + struct.pack(">H", height) + head[at + 2 :]
