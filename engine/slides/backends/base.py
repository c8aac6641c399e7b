"""What a backend offers: levels of 8-bit RGB and windows of them, in whole px of a level.

A backend knows one library and its files; it does not know µm/px targets, resampling or tissue. A px it cannot give is
marked, never made up: damaged px are GREY, px the file never held are ABSENT white, and both are invalid.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import SlideError
from engine.slides.backends.choice import Choice
from engine.slides.resolution import Claims

GREY = 128
"""Value of damaged px: neither glass nor tissue."""
ABSENT = 255
"""Value of px that the file does not hold (not scanned, outside the slide), as viewers show them."""
MIN_LEVEL_PX = 16
MAX_SEGMENT_PX = 2**26
"""A strip, tile or chunk is decoded whole: 200 MB. Larger ones make a slide unreadable in bounded memory."""
OTHER_COLOURS = frozenset({"PALETTE", "SEPARATED", "CMYK", "YCCK", "CIELAB", "ICCLAB", "ITULAB", "LOGLUV"})
"""Kinds of px that have colours, though not RGB."""


@dataclass
class Window:
    """A part of a level; starts out absent and is painted by a backend."""

    pixels: NDArray[np.uint8]
    """(h, w, 3)."""
    valid: NDArray[np.bool_]
    """(h, w): the px came from the file, undamaged."""
    damaged: int = 0
    """Blocks (tiles, chunks) under the window that could not be decoded."""

    @classmethod
    def absent(cls, h: int, w: int) -> "Window":
        """Return a window without any px of the file."""
        return cls(np.full((h, w, 3), ABSENT, np.uint8), np.zeros((h, w), np.bool_))

    def paint(self, y: int, x: int, pixels: NDArray[np.uint8] | None, size: tuple[int, int]) -> None:
        """Lay a decoded block of (h, w) px with its corner at (y, x) of the window; None is a damaged block."""
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + size[0], self.pixels.shape[0]), min(x + size[1], self.pixels.shape[1])
        if bottom <= top or right <= left:
            return
        if pixels is None:
            self.pixels[top:bottom, left:right] = GREY
            self.damaged += 1
            return
        block = pixels[top - y : bottom - y, left - x : right - x]
        if block.shape[2] == 3:
            self.pixels[top:bottom, left:right] = block
            self.valid[top:bottom, left:right] = True
        else:  # alpha 0: nothing was scanned here
            there = block[..., 3] > 0
            self.pixels[top:bottom, left:right][there] = block[..., :3][there]
            self.valid[top:bottom, left:right] = there


class Levels(Protocol):
    """An opened file. Windows may be read from several threads at once; it cannot be pickled: open it per process."""

    reader: str
    """Library that decodes."""
    sizes: tuple[tuple[int, int], ...]
    """(h, w) in px of each level, finest first."""
    claims: Claims
    choice: Choice
    """Which picture of the file it is."""

    def window(self, level: int, y: int, x: int, h: int, w: int) -> Window:
        """Return a window that lies inside the level. Raises SlideError `vanished` if the file cannot be read."""
        ...

    def close(self) -> None:
        """Give the file back; harmless when repeated."""
        ...


def check_rgb(name: str, samples: int, bits: int, kind: str) -> None:
    """Refuse what is not 8-bit RGB, with or without more samples. Raises SlideError `not_rgb` or `not_8_bit`."""
    if bits != 8:
        raise SlideError(
            "not_8_bit",
            f"{name}: px must be 8-bit RGB; they have {bits} bits. Nobody but you knows which range is white: convert "
            "it (for instance vips linear and cast).",
        )
    if samples < 3 or kind not in ("RGB", "YCBCR"):
        advice = "Features of a model trained on colour mean nothing here; convert it if you know better."
        if kind.upper() in OTHER_COLOURS:
            advice = "Convert it to RGB (for instance vips icc_transform or vips colourspace IN OUT srgb)."
        raise SlideError(
            "not_rgb", f"{name}: px must be 8-bit RGB; they are {kind.lower()} with {samples} sample(s). {advice}"
        )


def check_segment(name: str, shape: tuple[int, int]) -> None:
    """Refuse segments of (h, w) px that are too large to be decoded. Raises SlideError `unsupported`."""
    if shape[0] * shape[1] > MAX_SEGMENT_PX:
        raise SlideError(
            "unsupported",
            f"{name}: its px must lie in tiles, strips or chunks of at most {MAX_SEGMENT_PX} px; one has {shape[1]}x"
            f"{shape[0]}. Write it in tiles (for instance vips tiffsave --tile --pyramid).",
        )


def plausible_levels(sizes: list[tuple[int, int]]) -> list[int]:
    """Return the indices of sizes that are the same picture reduced: labels and thumbnails of other shape are not.

    Level 0 always is. A level must be smaller than the one before, and its factors on both axes may differ by one px
    of rounding and one part in a hundred. Raises: ValueError if level 0 has no px.
    """
    if min(sizes[0]) < 1:
        raise ValueError(f"a picture must have px; its size is {sizes[0]}")
    kept = [0]
    for i, (h, w) in enumerate(sizes[1:], 1):
        (full_h, full_w), (last_h, last_w) = sizes[0], sizes[kept[-1]]
        if min(h, w) < MIN_LEVEL_PX or h > last_h or w > last_w or (h, w) == (last_h, last_w):
            continue
        factor = full_h / h if h >= w else full_w / w
        slack_h, slack_w = 1 + 0.01 * h, 1 + 0.01 * w
        if abs(full_h / factor - h) <= slack_h and abs(full_w / factor - w) <= slack_w:
            kept.append(i)
    return kept


def level_scale(full: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Return level-0 px per px of a level (y, x).

    Writers reduce by a whole factor and round the size, up or down: where a whole factor explains both sizes, it is
    the scale (10001 / 2501 px is a factor of 4 whose last px is partial, not 3.9988). Else the ratio of the sizes is.
    """
    ratios = full[0] / size[0], full[1] / size[1]
    whole = max(1, round(max(full) / max(size)))
    if all(abs(f / whole - s) < 1 for f, s in zip(full, size, strict=True)):
        return float(whole), float(whole)
    return ratios
