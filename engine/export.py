"""Copies of the picture for other people's viewers, each whole or not there.

It reads an `Image` and computes no pixel of its own. Pyramids are top-level IFDs marked as reduced, in tiles of
256 px: what OpenSlide's generic-tiff, QuPath and tifffile agree on.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import tifffile
from PIL.PngImagePlugin import PngInfo

from engine.image import CHUNK_PX, Image
from engine.state import replacing

TIFF_TILE_PX = 256
PNG_LIMIT_PX = 16384
"""Longest edge of a PNG: viewers load it whole, 805 MB at this size."""
_TIFF_BUFFER_NBYTES = 16 << 20
"""Tiles compressed in one go by several threads; tifffile's own 512 MB would hold most pictures whole."""
PREVIEW_PX = 1024
"""Largest height of the preview, and half its largest width."""
_GAP_PX = 8


def write_tiff(
    path: Path, image: Image, compression: Literal["deflate", "jpeg"] = "deflate", jpeg_quality: int = 90
) -> None:
    """Write a tiled pyramidal BigTIFF with all levels of the picture; deflate keeps the pixels.

    The first level's ImageDescription is the provenance as JSON; the resolution is in px per cm.
    Raises: CanvasError if the disk refuses or the picture is damaged; a file that was there then still stands.
    """
    options: dict[str, Any] = {"compression": "deflate", "predictor": True}
    if compression == "jpeg":
        options = {"compression": "jpeg", "subsampling": (2, 2), "compressionargs": {"level": jpeg_quality}}
    description = json.dumps({**image.provenance, "mpp_um": image.mpp_um}, sort_keys=True)
    with (
        replacing(path, needed=4 * image.height * image.width) as partial,
        tifffile.TiffWriter(partial, bigtiff=True) as tiff,
    ):
        for level, (height, width) in enumerate(image.sizes):
            per_cm = resolution(image.mpp_um * 2**level)
            tiff.write(
                _tiles(image, level),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(TIFF_TILE_PX, TIFF_TILE_PX),
                photometric="rgb",  # of the tiles; tifffile stores JPEG as YCbCr by itself
                subfiletype=1 if level else 0,  # OpenSlide takes a further IFD for a level only when it says so
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                description=None if level else description,
                metadata=None,
                software="zoomldm-engine",
                buffersize=_TIFF_BUFFER_NBYTES,
                **options,
            )


def resolution(mpp_um: float) -> tuple[int, int]:
    """Return px per cm as a TIFF rational, two numbers below 2**32, for a px of so many µm."""
    per_cm = Fraction(10_000) / Fraction(mpp_um)
    limit = 2**31  # leaves room for the rounding of the numerator
    ratio = per_cm.limit_denominator(max(1, min(limit, int(limit / per_cm))))
    if not 0 < ratio.numerator < 2**32:
        raise ValueError(f"mpp_um must be within 1e-5..1e13 µm/px for a TIFF; got {mpp_um}.")
    return ratio.numerator, ratio.denominator


def _tiles(image: Image, level: int) -> Iterator[np.ndarray]:
    """Yield the tiles row by row, uint8 (256, 256, 3); memory holds one row of chunks."""
    height, width = image.sizes[level]
    for y0 in range(0, height, CHUNK_PX):
        rows = image.read(y0, min(y0 + CHUNK_PX, height), level=level).transpose(1, 2, 0)
        for y in range(0, rows.shape[0], TIFF_TILE_PX):
            for x in range(0, width, TIFF_TILE_PX):
                tile = rows[y : y + TIFF_TILE_PX, x : x + TIFF_TILE_PX]
                missing = [(0, TIFF_TILE_PX - tile.shape[0]), (0, TIFF_TILE_PX - tile.shape[1]), (0, 0)]
                # repeated borders: black ones would ring into the picture under JPEG
                yield np.ascontiguousarray(np.pad(tile, missing, mode="edge"))


def check_png(height: int, width: int) -> None:
    """Refuse a PNG that viewers cannot open. Raises ValueError; ask before the run starts."""
    if max(height, width) > PNG_LIMIT_PX:
        raise ValueError(
            f"a PNG must have at most {PNG_LIMIT_PX} px per edge; the picture has {height} x {width}. Leave png out of "
            "output.formats and use tiff."
        )


def write_png(path: Path, image: Image) -> None:
    """Write the whole picture as PNG, with the provenance as text; memory holds one row of chunks.

    By hand, because Pillow would hold the picture three times: 720 MB at 8192² px.
    Raises: ValueError above 16384 px; CanvasError if the disk refuses or the picture is damaged.
    """
    check_png(image.height, image.width)
    text = b"provenance\0" + json.dumps(image.provenance, sort_keys=True).encode("latin-1")
    with replacing(path, needed=3 * image.height * image.width) as partial, partial.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(_png_chunk(b"IHDR", struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0)))  # 8-bit RGB
        file.write(_png_chunk(b"tEXt", text))
        packer = zlib.compressobj()
        for y0 in range(0, image.height, CHUNK_PX):
            rows = image.read(y0, min(y0 + CHUNK_PX, image.height)).transpose(1, 2, 0)
            file.write(_png_chunk(b"IDAT", packer.compress(_png_rows(rows))))
        file.write(_png_chunk(b"IDAT", packer.flush()))
        file.write(_png_chunk(b"IEND", b""))


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_rows(rows: np.ndarray) -> bytes:
    """Return rows, uint8 (n, w, 3), as differences to the px on the left: PNG's filter 1, named before each row."""
    lines = np.empty((rows.shape[0], 1 + 3 * rows.shape[1]), np.uint8)
    lines[:, 0] = 1
    lines[:, 1:4] = rows[:, 0]
    lines[:, 4:] = (rows[:, 1:] - rows[:, :-1]).reshape(rows.shape[0], -1)  # wraps around, as the format wants
    return lines.tobytes()


def write_picture(path: Path, picture: np.ndarray, provenance: dict[str, Any]) -> None:
    """Write a small picture, uint8 (3, h, w), such as the guide, as PNG. Raises CanvasError."""
    _save_png(path, _to_pil(picture), provenance)


def write_preview(path: Path, image: Image, guide: np.ndarray | None) -> None:
    """Write the reduced canvas and, beside it at the same height, the guide, uint8 (3, h, w). Raises CanvasError."""
    scale = min(1.0, PREVIEW_PX / image.height, PREVIEW_PX / image.width)
    height, width = (max(1, round(s * scale)) for s in (image.height, image.width))
    level = max(i for i, (h, w) in enumerate(image.sizes) if (h >= height and w >= width) or i == 0)
    canvas = _to_pil(image.read(0, image.sizes[level][0], level=level)).resize(
        (width, height), PIL.Image.Resampling.LANCZOS
    )
    if guide is not None:
        beside = _to_pil(guide)
        right = max(1, round(beside.width * height / beside.height))
        sheet = PIL.Image.new("RGB", (width + _GAP_PX + right, height), "white")
        sheet.paste(canvas, (0, 0))
        sheet.paste(beside.resize((right, height), PIL.Image.Resampling.BICUBIC), (width + _GAP_PX, 0))
        canvas = sheet
    _save_png(path, canvas, image.provenance)


def _to_pil(picture: np.ndarray) -> PIL.Image.Image:
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8 (3, h, w); got {picture.dtype} {picture.shape}.")
    return PIL.Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))


def _save_png(path: Path, picture: PIL.Image.Image, provenance: dict[str, Any]) -> None:
    text = PngInfo()
    text.add_text("provenance", json.dumps(provenance, sort_keys=True))
    with replacing(path) as partial, partial.open("wb") as file:
        picture.save(file, format="PNG", pnginfo=text)
