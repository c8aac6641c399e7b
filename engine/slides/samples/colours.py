"""What the decoded samples of a TIFF page are, and how they become RGB; or why they do not.

Invariant: samples are RGB, are converted by the rule of their own standard, or the page is refused by name. What a
page says in two places (compression and photometric interpretation, tag and stream) must agree. Decoders of JPEG give
RGB themselves; all others give the samples as they were stored. It decodes nothing and knows no files. Sources: TIFF
6.0 (sections 20 and 21), Adobe TIFF technical notes, JPEG 2000 (ISO 15444-1, annexes A and I), OpenSlide 4.0.1 for
Aperio's codes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from engine.core.errors import UNREADABLE, SlideError
from engine.slides.backends.base import check_rgb

PLAIN = frozenset({1, 5, 8, 32773, 32946, 34887, 34925, 34926, 50000, 50013})
"""Compressions that keep samples as they are: none, LZW, deflate, PackBits, LERC, LZMA, Zstandard."""
JPEGS = frozenset({6, 7, 33007, 34892})
"""Old and new JPEG, and its other numbers."""
JPEG_2000 = frozenset({33003, 33004, 33005, 34712})
OF_THEIR_OWN = frozenset({22610, 34927, 34933, 34934, 50001, 50002, 52546})
"""JPEG XR, WebP, PNG, JPEG XL: their streams are RGB by their own definition."""
_APERIO_YCC, _APERIO_RGB = 33003, 33005
APERIO_JPEG_2000 = frozenset({_APERIO_YCC, _APERIO_RGB})
_PLACES = {"red": 0, "r": 0, "ff0000": 0, "green": 1, "g": 1, "00ff00": 1, "blue": 2, "b": 2, "0000ff": 2}
"""Where a colour stands in RGB."""
_CONVERT = "Convert it to RGB (for instance vips icc_transform or vips colourspace IN OUT srgb)."


@dataclass(frozen=True)
class Colours:
    """How the samples of a page become RGB."""

    ycbcr: "YCbCr | None" = None
    """None: they are RGB."""
    subsampling: tuple[int, int] = (1, 1)
    """Px per chroma sample (x, y), as the segments lie in the file."""

    def to_rgb(self, samples: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Convert uint8 (h, w, 3)."""
        return samples if self.ycbcr is None else self.ycbcr.to_rgb(samples)

    def unpack(self, data: bytes, h: int, w: int) -> NDArray[np.uint8] | None:
        """Return YCbCr (h, w, 3) of a decompressed, subsampled segment; None if bytes are missing.

        A data unit holds the luma of a block row by row, then one Cb and one Cr (TIFF 6.0, section 21); chroma is
        repeated over its block, as libtiff does.
        """
        sx, sy = self.subsampling
        rows, columns, each = -(-h // sy), -(-w // sx), sx * sy + 2
        if len(data) < rows * columns * each:
            return None
        units = np.frombuffer(data, np.uint8, rows * columns * each).reshape(rows, columns, each)
        found = np.empty((rows * sy, columns * sx, 3), np.uint8)
        luma = units[..., : sx * sy].reshape(rows, columns, sy, sx).swapaxes(1, 2)
        found[..., 0] = luma.reshape(rows * sy, columns * sx)
        found[..., 1:] = units[..., sx * sy :].repeat(sy, axis=0).repeat(sx, axis=1)
        return found[:h, :w]


@dataclass(frozen=True)
class YCbCr:
    """Luma and chroma of TIFF 6.0, section 21."""

    luma: tuple[float, float, float] = (0.299, 0.587, 0.114)
    """Shares of red, green and blue; these are ITU-R BT.601's."""
    black_white: tuple[float, ...] = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)
    """Codes of no and full Y, Cb, Cr."""

    def to_rgb(self, samples: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Convert uint8 (h, w, 3)."""
        low, high = np.array(self.black_white, np.float32).reshape(3, 2).T
        y, cb, cr = np.moveaxis((samples - low) * (np.array([255, 127, 127], np.float32) / (high - low)), -1, 0)
        red, green, blue = self.luma
        r, b = y + cr * (2 - 2 * red), y + cb * (2 - 2 * blue)
        g = (y - blue * b - red * r) / green
        return np.clip(np.rint(np.stack([r, g, b], axis=-1)), 0, 255).astype(np.uint8)


def colours_of(name: str, page: Any, first: Callable[[], bytes], is_ome: bool = False) -> Colours:
    """Return how a page becomes RGB; `first` reads the bytes of its first segment that has any.

    Raises: SlideError `not_8_bit`, `not_rgb` or `unsupported`.
    """
    kind = kind_of(page)
    check_rgb(name, page.samplesperpixel, page.bitspersample, kind)
    check_unsigned(name, page.dtype)
    compression = int(page.compression)
    if compression not in PLAIN | JPEGS | JPEG_2000 | OF_THEIR_OWN:
        raise SlideError(
            "unsupported",
            f"{name}: px must be stored in a form that is known; their compression is {page.compression!s} "
            f"({compression}). Write it anew (for instance vips tiffsave --compression deflate).",
        )
    if compression in JPEG_2000:
        return _of_jpeg_2000(name, page, compression, kind, first(), is_ome)
    if kind == "RGB" or (compression in JPEGS and page.samplesperpixel == 3):
        return Colours()
    if compression in PLAIN and page.samplesperpixel == 3:
        return Colours(_ycbcr_of(name, page), _subsampling(name, page, compression, first))
    raise _contradiction(name, f"{page.compression!s} with {page.samplesperpixel} samples cannot hold YCbCr")


def check_unsigned(name: str, dtype: Any) -> None:
    """Refuse 8-bit samples that are no uint8. Raises SlideError `not_8_bit`."""
    if dtype != np.uint8:
        raise SlideError(
            "not_8_bit", f"{name}: px must be 8-bit RGB without sign; they are {dtype}. Convert it to uint8."
        )


def kind_of(page: Any) -> str:
    """Return the name of a page's photometric interpretation; one without a name gives its number."""
    try:
        return tifffile.PHOTOMETRIC(page.photometric).name
    except ValueError:
        return f"photometric {page.photometric}"


def check_planes(name: str, page: Any, channels: Sequence[str] = ()) -> None:
    """Refuse planes that are no red, green and blue: by their photometric interpretation, or by the names of channels.

    Raises: SlideError `not_8_bit` or `not_rgb`.
    """
    kind = kind_of(page)
    check_rgb(name, 3, page.bitspersample, "RGB" if kind == "MINISBLACK" else kind)
    check_unsigned(name, page.dtype)
    if kind == "YCBCR":
        raise SlideError(
            "not_rgb",
            f"{name}: px must be 8-bit RGB; they are YCbCr, one plane per component, whose planes cannot be read. "
            f"{_CONVERT}",
        )
    check_channels(name, channels)


def check_channels(name: str, channels: Sequence[str]) -> None:
    """Refuse three channels whose names or colours say that they are not red, green and blue: stains, for instance.

    `channels` are names (DAPI, CD3) or colours (FF0000); blank ones and numbers say nothing.
    Raises: SlideError `not_rgb`.
    """
    plain = [_plainly(text) for text in channels]
    wrong = [text for at, text in enumerate(plain) if text and _PLACES.get(text) != at]
    if wrong:
        raise SlideError(
            "not_rgb",
            f"{name}: its three channels must be red, green and blue; they are {', '.join(channels)}. Features of a "
            "model trained on colour mean nothing here; convert it if you know better.",
        )


def _plainly(channel: str) -> str:
    """Return red, green, blue, "" for a channel whose name says nothing, or its name."""
    text = channel.strip().lower()
    if colour := re.search(r"(?<![a-z])(red|green|blue)(?![a-z])|^([rgb])$|^#?(ff0000|00ff00|0000ff)$", text):
        return colour[0].lstrip("#")
    quiet = r"(channel|chan|ch|c|default|none|rgb|#?ffffff|h&e|he)?[\s:_#-]*[\d\s:_-]*|.*(bright|transmit|visible).*"
    return "" if re.fullmatch(quiet, text) else text


def _of_jpeg_2000(name: str, page: Any, code: int, kind: str, stream: bytes, is_ome: bool) -> Colours:
    """Tell RGB from YCbCr by the tag, Aperio's two codes and what the stream says of itself."""
    mixed, subsampled, is_sycc = _jpeg_2000_says(stream)
    if subsampled:
        raise SlideError(
            "unsupported",
            f"{name}: JPEG 2000 must hold all its components at full size; this one is subsampled. Write it anew "
            "(for instance vips tiffsave --compression deflate).",
        )
    if is_sycc:
        return Colours()  # the decoder converts it
    if kind == "YCBCR" and code != _APERIO_RGB and page.samplesperpixel == 3:
        return Colours(_ycbcr_of(name, page))
    if kind == "RGB" and (code != _APERIO_YCC or (is_ome and mixed)):
        return Colours()  # Bio-Formats writes RGB under Aperio's code; its streams transform RGB themselves
    raise _contradiction(name, f"compression {code} says {'RGB' if code == _APERIO_RGB else 'YCbCr'}, the tag {kind}")


def check_aperio(name: str, page: Any, stream: bytes) -> None:
    """Refuse JPEG 2000 of Aperio's codes that is not as Aperio writes it, whatever its decoder would make of it.

    33003 is YCbCr without the stream's own transform, under a tag that says RGB; 33005 is RGB. Raises: SlideError
    `not_rgb`.
    """
    mixed, kind, code = _jpeg_2000_says(stream)[0], kind_of(page), int(page.compression)
    if code == _APERIO_YCC and kind == "RGB" and mixed:
        raise _contradiction(name, "compression 33003 says YCbCr, the tag and the stream's own transform RGB")
    if code == _APERIO_RGB and kind != "RGB":
        raise _contradiction(name, f"compression 33005 says RGB, the tag {kind}")


def _jpeg_2000_says(stream: bytes) -> tuple[bool, bool, bool]:
    """Return whether a stream transforms RGB itself, is subsampled, and is sYCC by its colour box."""
    size, box = stream.find(b"\xff\x4f\xff\x51"), stream.find(b"colr\x01")
    style = stream.find(b"\xff\x52", size + 4 + int.from_bytes(stream[size + 4 : size + 6]))
    if size < 0 or style < 0 or len(stream) < size + 42:
        return False, False, False  # damaged: no px of it will be believed
    count = int.from_bytes(stream[size + 40 : size + 42])
    steps = [stream[size + 43 + 3 * i : size + 45 + 3 * i] for i in range(count)]
    sycc = box >= 0 and int.from_bytes(stream[box + 7 : box + 11]) == 18
    return stream[style + 8 : style + 9] == b"\1", any(step != b"\1\1" for step in steps), sycc


def _subsampling(name: str, page: Any, compression: int, first: Callable[[], bytes]) -> tuple[int, int]:
    """Return the subsampling of samples that are stored as they are."""
    tag = page.tags.get(530)
    try:
        found = (2, 2) if tag is None else tuple(int(v) for v in tag.value)  # TIFF 6.0: no tag is 2 × 2
    except (ValueError, TypeError):
        found = ()
    if len(found) != 2 or any(v not in (1, 2, 4) for v in found):
        raise _contradiction(name, f"YCbCrSubSampling is {getattr(tag, 'value', None)}, and must be 1, 2 or 4 twice")
    if tag is None and _is_full(page, first()):
        found = (1, 1)
    if found != (1, 1) and (page.predictor != 1 or compression == 34887):
        raise SlideError(
            "unsupported",
            f"{name}: subsampled YCbCr must be stored without a predictor; it has predictor {page.predictor!s}. "
            f"{_CONVERT}",
        )
    return found[0], found[1]


def _is_full(page: Any, data: bytes) -> bool:
    """Whether a segment is as long as three samples per px are; some writers leave the tag out where it is 1 × 1."""
    rows, columns = min(page.rowsperstrip, page.imagelength), page.imagewidth
    if page.is_tiled:
        rows, columns = page.tilelength, page.tilewidth
    try:
        return len(decompress(page, data)) >= 3 * rows * columns
    except UNREADABLE:
        return False


def decompress(page: Any, data: bytes) -> bytes:
    """Return a segment without its compression, one of `PLAIN` but LERC. Raises one of UNREADABLE."""
    if page.fillorder == 2:
        data = bytes(imagecodecs.bitorder_decode(data))
    compression = int(page.compression)
    return data if compression == 1 else bytes(tifffile.TIFF.DECOMPRESSORS[compression](data))


def _ycbcr_of(name: str, page: Any) -> YCbCr:
    """Read YCbCrCoefficients and ReferenceBlackWhite. Raises SlideError `unsupported`."""
    luma, scale = (_fractions(page.tags.get(code), count) for code, count in ((529, 3), (532, 6)))
    found = YCbCr(tuple(luma or YCbCr.luma), tuple(scale or YCbCr.black_white))  # type: ignore[arg-type]
    low, high = np.array(found.black_white).reshape(3, 2).T
    if not (min(found.luma) > 0 and abs(sum(found.luma) - 1) < 0.02 and (high > low).all()):
        raise _contradiction(name, f"YCbCrCoefficients {found.luma} or ReferenceBlackWhite {found.black_white}")
    return found


def _fractions(tag: Any, count: int) -> list[float] | None:
    """Return the numbers of a tag of fractions, floats or whole numbers; None if it is absent or of another length."""
    values = [] if tag is None else [float(v) for v in np.ravel(tag.value)]
    if len(values) == 2 * count:
        values = [a / b if b else np.nan for a, b in zip(values[::2], values[1::2], strict=True)]
    return values if len(values) == count else None


def _contradiction(name: str, what: str) -> SlideError:
    return SlideError(
        "not_rgb", f"{name}: what the file says of its colours must agree; {what}. Only its maker knows which it is. "
        f"{_CONVERT}",
    )  # fmt: skip
