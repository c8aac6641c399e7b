"""PNG and JPEG: one level, decoded whole when it is opened.

Such a file states no µm/px that can be believed: its density is a print size. A damaged picture is refused, because
what lies behind a break cannot be told from what lies before it; decoders are strict for that reason, and not
Pillow's, which paints on and whose size limit is a variable of the whole process. Orientation tags are ignored:
coordinates are those of the stored px. Reads are safe from several threads.
"""

import struct
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from engine.core.errors import UNREADABLE, SlideError
from engine.slides.backends.base import Window, check_rgb
from engine.slides.backends.choice import ONLY, only_one
from engine.slides.resolution import Claims
from engine.slides.samples.cut_streams import strict_jpeg

PNG, JPEG = b"\x89PNG", b"\xff\xd8\xff"
MAX_PX = 2**29
"""Largest picture in px (23170²): 1.6 GB as an array."""
_PNG_KINDS = {0: ("greyscale", 1), 2: ("RGB", 3), 3: ("palette", 1), 4: ("greyscale", 2), 6: ("RGB", 4)}


def open_picture(path: Path, name: str, series: int | None = None) -> "PictureLevels":
    """Decode a picture; `series` may be 0.

    Raises: SlideError `damaged`, `not_rgb`, `not_8_bit`, `no_such_series` or `unsupported`; OSError.
    """
    only_one(name, series)
    data = path.read_bytes()
    try:
        height, width = _check_png(data, name) if data.startswith(PNG) else _check_jpeg(data, name)
        if height * width > MAX_PX:
            raise SlideError(
                "unsupported",
                f"{name}: a PNG or JPEG must have at most {MAX_PX} px, because it is decoded whole; it is "
                f"{width}x{height}. Write it as a tiled TIFF (for instance vips tiffsave --tile --pyramid).",
            )
        pixels = imagecodecs.png_decode(data) if data.startswith(PNG) else strict_jpeg(data)
    except UNREADABLE as error:
        raise SlideError(
            "damaged", f"{name}: {path} must be whole; it cannot be decoded ({error}). Copy it again."
        ) from error
    return PictureLevels(np.asarray(pixels))


def _check_png(data: bytes, name: str) -> tuple[int, int]:
    width, height, bits, kind = struct.unpack(">IIBB", data[16:26])
    label, samples = _PNG_KINDS[kind]
    check_rgb(name, samples, bits if label != "palette" else 8, label)
    return height, width


def _check_jpeg(data: bytes, name: str) -> tuple[int, int]:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    check_rgb(name, 3, 8, "RGB" if colours in ("RGB", "YCbCr") else colours)
    return int(height), int(width)


class PictureLevels:
    """One level in memory."""

    reader, choice = "picture", ONLY

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        """`pixels` is (h, w, 3) or, with alpha, (h, w, 4)."""
        self._pixels = pixels
        self.sizes = (pixels.shape[:2],)
        self.claims = Claims()

    def window(self, level: int, y: int, x: int, h: int, w: int) -> Window:
        """Return a window that lies inside the picture."""
        assert level == 0
        window = Window.absent(h, w)
        window.paint(0, 0, self._pixels[y : y + h, x : x + w], (h, w))
        return window

    def close(self) -> None:
        """Do nothing: no file is held."""
