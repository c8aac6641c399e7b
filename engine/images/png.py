"""PNG: the whole picture or a crop, streamed; small pictures; and the preview.

Every file carries the provenance as text (keyword "provenance", JSON). Source: PNG specification, third edition.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngInfo

from engine.core.files import replacing
from engine.images.pyramid import Picture, label, resized, strips, to_pil

PNG_LIMIT_PX = 16384
"""Longest edge of a PNG: viewers load it whole, 805 MB at this size."""
PREVIEW_PX = 1024
"""Largest height of the preview, and half its largest width."""
_GAP_PX = 8
_PER_METRE = 1


def check_png(height: int, width: int) -> None:
    """Refuse a PNG that viewers cannot open. Raises ValueError; ask before the run starts."""
    if max(height, width) > PNG_LIMIT_PX:
        raise ValueError(
            f"a PNG must have at most {PNG_LIMIT_PX} px per edge; the picture has {height} x {width}. Leave png out of "
            "output.formats and use tiff, or export a region or a smaller level."
        )


def write_png(path: Path, picture: Picture) -> None:
    """Write level 0 as PNG, with px per metre and the provenance as text; memory holds one row of chunks.

    By hand, because Pillow would hold the picture three times: 720 MB at 8192² px.
    Raises: ValueError above 16384 px; CanvasError if the disk refuses or the picture is damaged.
    """
    height, width = picture.sizes[0]
    check_png(height, width)
    per_metre = round(1e6 / picture.mpp_um)
    with replacing(path, needed=3 * height * width) as partial, partial.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))  # 8-bit RGB
        if 1 <= per_metre < 2**31:  # whole numbers only; the text has the exact scale
            file.write(_chunk(b"pHYs", struct.pack(">IIB", per_metre, per_metre, _PER_METRE)))
        file.write(_chunk(b"tEXt", b"provenance\0" + label(picture).encode("latin-1")))
        packer = zlib.compressobj()
        for rows in strips(picture):
            file.write(_chunk(b"IDAT", packer.compress(_lines(rows))))
        file.write(_chunk(b"IDAT", packer.flush()))
        file.write(_chunk(b"IEND", b""))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _lines(rows: np.ndarray) -> bytes:
    """Return rows, uint8 (n, w, 3), as differences to the px on the left: PNG's filter 1, named before each row."""
    lines = np.empty((rows.shape[0], 1 + 3 * rows.shape[1]), np.uint8)
    lines[:, 0] = 1
    lines[:, 1:4] = rows[:, 0]
    lines[:, 4:] = (rows[:, 1:] - rows[:, :-1]).reshape(rows.shape[0], -1)  # wraps around, as the format wants
    return lines.tobytes()


def write_picture(path: Path, pixels: np.ndarray, provenance: dict[str, Any]) -> None:
    """Write a small picture, uint8 (3, h, w), such as the guide, as PNG. Raises CanvasError."""
    _save(path, to_pil(pixels), provenance)


def write_preview(path: Path, picture: Picture, guide: np.ndarray | None) -> None:
    """Write the reduced canvas and, beside it at the same height, the guide, uint8 (3, h, w). Raises CanvasError."""
    whole_h, whole_w = picture.sizes[0]
    scale = min(1.0, PREVIEW_PX / whole_h, PREVIEW_PX / whole_w)
    height, width = (max(1, round(s * scale)) for s in (whole_h, whole_w))
    canvas = resized(picture, height, width)
    if guide is not None:
        beside = to_pil(guide)
        right = max(1, round(beside.width * height / beside.height))
        sheet = PIL.Image.new("RGB", (width + _GAP_PX + right, height), "white")
        sheet.paste(canvas, (0, 0))
        sheet.paste(beside.resize((right, height), PIL.Image.Resampling.BICUBIC), (width + _GAP_PX, 0))
        canvas = sheet
    _save(path, canvas, picture.provenance)


def _save(path: Path, pixels: PIL.Image.Image, provenance: dict[str, Any]) -> None:
    text = PngInfo()
    text.add_text("provenance", json.dumps(provenance, sort_keys=True))
    with replacing(path) as partial, partial.open("wb") as file:
        pixels.save(file, format="PNG", pnginfo=text)
