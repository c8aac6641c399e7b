"""What an export reads: a pyramid of RGB levels with its scale and provenance, wherever the pixels lie.

It writes no file. `engine.images.ome_zarr.Image` is a Picture; the others here are views of one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import PIL.Image

from engine.images.ome_zarr import CHUNK_PX

REDUCED_LIMIT_PX = 2048
"""Longest edge of a picture reduced in memory; it is made from a level at most twice as large, 50 MB."""


class Picture(Protocol):
    """An RGB pyramid, finest level first."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(h, w) in px of each level; each is half as large as the one before, rounded up."""
        ...

    @property
    def mpp_um(self) -> float:
        """Size of a level-0 px in µm."""
        ...

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the picture comes from; JSON-able, says synthetic: true."""
        ...

    def read(self, y0: int, y1: int, x0: int = 0, x1: int | None = None, level: int = 0) -> np.ndarray:
        """Return a window as uint8 (3, y1-y0, x1-x0), in px of that level."""
        ...


@dataclass(frozen=True)
class FromLevel:
    """A picture without its finest levels. Raises ValueError when the level is not there."""

    whole: Picture
    first: int

    def __post_init__(self) -> None:
        count = len(self.whole.sizes)
        if not 0 <= self.first < count:
            raise ValueError(
                f"level must lie in 0..{count - 1}, the levels of this picture; got {self.first}. Level n is 2**n "
                "times smaller; for something smaller still ask for max_px."
            )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return self.whole.sizes[self.first :]

    @property
    def mpp_um(self) -> float:
        return self.whole.mpp_um * 2**self.first

    @property
    def provenance(self) -> dict[str, Any]:
        return self.whole.provenance

    def read(self, y0: int, y1: int, x0: int = 0, x1: int | None = None, level: int = 0) -> np.ndarray:
        return self.whole.read(y0, y1, x0, x1, level + self.first)


@dataclass(frozen=True)
class InMemory:
    """A small picture of one level, uint8 (3, h, w)."""

    pixels: np.ndarray
    mpp_um: float
    provenance: dict[str, Any]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(self.pixels.shape[1], self.pixels.shape[2])]

    def read(self, y0: int, y1: int, x0: int = 0, x1: int | None = None, level: int = 0) -> np.ndarray:
        assert level == 0
        return self.pixels[:, y0:y1, x0:x1]


def reduced(picture: Picture, max_px: int) -> Picture:
    """Return the picture with its longest edge reduced to at most max_px, or itself if it is as small already.

    Raises: ValueError unless max_px lies in 1..2048.
    """
    if not 1 <= max_px <= REDUCED_LIMIT_PX:
        raise ValueError(
            f"max_px must lie in 1..{REDUCED_LIMIT_PX}, because it is made in memory; got {max_px}. Use level for "
            "something larger."
        )
    height, width = picture.sizes[0]
    scale = max_px / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = np.asarray(resized(picture, *size)).transpose(2, 0, 1)
    return InMemory(pixels, picture.mpp_um / scale, picture.provenance)


def resized(picture: Picture, height: int, width: int) -> PIL.Image.Image:
    """Return a small picture of the whole (px), from the coarsest level that is not smaller."""
    level = max(i for i, (h, w) in enumerate(picture.sizes) if (h >= height and w >= width) or i == 0)
    pixels = to_pil(picture.read(0, picture.sizes[level][0], level=level))
    return pixels.resize((width, height), PIL.Image.Resampling.LANCZOS)


def to_pil(picture: np.ndarray) -> PIL.Image.Image:
    """Return uint8 (3, h, w) as Pillow's RGB. Raises ValueError for anything else."""
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8 (3, h, w); got {picture.dtype} {picture.shape}.")
    return PIL.Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))


def strips(picture: Picture, level: int = 0) -> Iterator[np.ndarray]:
    """Yield a level top to bottom in rows of chunks: uint8 (n, w, 3), n = 512 but for the last."""
    height = picture.sizes[level][0]
    for y0 in range(0, height, CHUNK_PX):
        yield picture.read(y0, min(y0 + CHUNK_PX, height), level=level).transpose(1, 2, 0)


def labelled(picture: Picture) -> dict[str, Any]:
    """Return what every export says of itself: the provenance and the scale."""
    return {**picture.provenance, "mpp_um": picture.mpp_um}


def label(picture: Picture) -> str:
    """Return that as JSON in ASCII, for formats with room for one text."""
    return json.dumps(labelled(picture), sort_keys=True)


def resolution(mpp_um: float) -> tuple[int, int]:
    """Return px per cm as a TIFF rational, two numbers below 2**32, for a px of so many µm."""
    per_cm = Fraction(10_000) / Fraction(mpp_um)
    limit = 2**31  # leaves room for the rounding of the numerator
    ratio = per_cm.limit_denominator(max(1, min(limit, int(limit / per_cm))))
    if not 0 < ratio.numerator < 2**32:
        raise ValueError(f"mpp_um must be within 1e-5..1e13 µm/px for a TIFF; got {mpp_um}.")
    return ratio.numerator, ratio.denominator
