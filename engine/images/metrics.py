"""What a run reports about itself: seams, agreement with the guide, times, versions.

It judges pictures and never changes them; everything is streamed in bands of rows. Scores are about pixel values
0..255 and say nothing about how real the tissue looks.
"""

import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.core.files import write_atomically
from engine.core.units import LATENT_FACTOR

BAND_PX = 256
_CLEAR_PX = 8
"""What a moved line keeps to any border, two latent px."""
GOOD_SEAM_SCORE = 1.10
"""Up to here borders are as smooth as the rest."""
_LIBRARIES = ("torch", "diffusers", "numpy", "zarr", "tifffile")


class Picture(Protocol):
    """Rows of RGB: an `Image`, or anything like it."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    def read(self, y0: int, y1: int) -> np.ndarray:
        """Return uint8 (3, y1-y0, width)."""
        ...


class InMemory:
    """An array, uint8 (3, h, w), as a `Picture`."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    @property
    def height(self) -> int:
        return self._pixels.shape[1]

    @property
    def width(self) -> int:
        return self._pixels.shape[2]

    def read(self, y0: int, y1: int) -> np.ndarray:
        return self._pixels[:, y0:y1]


def seam_score(picture: Picture, edges_y: Sequence[int], edges_x: Sequence[int]) -> float | None:
    """Return the first of `seam_scores`."""
    return seam_scores(picture, edges_y, edges_x)[0]


def seam_scores(picture: Picture, edges_y: Sequence[int], edges_x: Sequence[int]) -> tuple[float | None, float | None]:
    """Return the mean absolute gradient across tile borders, relative to that inside tiles; up to 1.10 is good.

    Edges are the first row or column after a border, in px; 0 and the picture's size are its own border and do not
    count. Rows and columns are compared with their own kind and the worse one is returned: the average of both would
    hide seams that run one way only.
    Second comes the score's control: the 95th percentile of what the same picture scores when all borders are moved
    off their places together. On 1024² it reaches 1.1 in a seamless picture, because eight lines cross few things.
    Returns: None if there is no border; inf if only borders have gradients; 1.0 for a flat picture. The control is None
    where borders lie too close to be moved.
    Raises: ValueError for an edge outside the picture.
    """
    return scores_of(_profiles(picture), edges_y, edges_x)


def scores_of(
    profiles: tuple[np.ndarray, np.ndarray], edges_y: Sequence[int], edges_x: Sequence[int]
) -> tuple[float | None, float | None]:
    """Return the `seam_scores` of a picture whose profiles are known: the mean gradient of each row and column."""
    axes = []
    for profile, edges in zip(profiles, (edges_y, edges_x), strict=True):
        size = len(profile)
        if any(not 0 <= e <= size for e in edges):
            raise ValueError(f"edges must lie in 0..{size} px; got {min(edges)}..{max(edges)}.")
        axes.append((profile, sorted({e for e in edges if 0 < e < size})))
    room = min((b - a for _, at in axes for a, b in pairwise([0, *at])), default=0) - _CLEAR_PX
    moves = [m for m in range(_CLEAR_PX, room + 1, LATENT_FACTOR) for m in (m, -m)]
    elsewhere = [score for m in moves if (score := _border_ratio(axes, m)) is not None]
    return _border_ratio(axes, 0), float(np.quantile(elsewhere, 0.95)) if elsewhere else None


def _border_ratio(axes: list[tuple[np.ndarray, list[int]]], moved: int) -> float | None:
    """Return the worse axis' ratio of the gradient on lines moved by `moved` px to that off all borders."""
    ratios = []
    for profile, borders in axes:
        at = [e + moved for e in borders if 0 < e + moved < len(profile)]
        inside = np.delete(profile, [0, *borders])
        if at and inside.size:
            border, rest = float(profile[at].mean()), float(inside.mean())
            ratios.append(border / rest if rest else (math.inf if border else 1.0))
    return max(ratios, default=None)


def _profiles(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean absolute difference of each row to the one above, and of each column to its left; [0] is 0."""
    across_y, across_x = np.zeros(picture.height), np.zeros(picture.width)
    above = None
    for y0, rows in _bands(picture, BAND_PX):
        rows = rows.astype(np.int16)
        joined = rows if above is None else np.concatenate([above, rows], axis=1)
        first = y0 if above is not None else 1
        across_y[first : y0 + rows.shape[1]] = np.abs(np.diff(joined, axis=1)).mean(axis=(0, 2))
        across_x[1:] += np.abs(np.diff(rows, axis=2)).sum(axis=(0, 1), dtype=np.int64)
        above = rows[:, -1:]
    return across_y, across_x / (3 * picture.height)


def consistency_psnr(picture: Picture, guide: np.ndarray) -> float:
    """Return how well the picture, box-averaged to the guide's size, agrees with the guide, uint8 (3, h, w), in dB.

    Returns: inf when they are equal. Raises: ValueError if the picture is not a whole multiple of the guide.
    """
    factor = picture.height // guide.shape[1]
    if factor < 1 or (guide.shape[1] * factor, guide.shape[2] * factor) != (picture.height, picture.width):
        raise ValueError(
            f"the picture must be a whole multiple of the guide; got {picture.height} x {picture.width} px and "
            f"{guide.shape[1]} x {guide.shape[2]} px. Crop the guide to what the picture covers."
        )
    squares = 0.0
    for y0, rows in _bands(picture, max(1, BAND_PX // factor) * factor):
        n = rows.shape[1] // factor
        small = rows.reshape(3, n, factor, guide.shape[2], factor).mean(axis=(2, 4))
        squares += float(((small - guide[:, y0 // factor : y0 // factor + n]) ** 2).sum())
    error = squares / guide.size
    return 10 * math.log10(255**2 / error) if error else math.inf


def _bands(picture: Picture, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for y0 in range(0, picture.height, size):
        yield y0, picture.read(y0, min(y0 + size, picture.height))


def write_report(
    path: Path, facts: dict[str, object], timings_s: dict[str, float], versions: dict[str, str] | None = None
) -> None:
    """Write report.json whole: the facts, seconds per phase, versions and machine.

    `versions` adds to those looked up here (ray is the caller's: this package does not know it). JSON has no NaN and
    no infinity; they are written as null. Raises: CanvasError if the disk refuses; TypeError for what JSON lacks.
    """
    record = {
        **facts,
        "timings_s": {phase: round(seconds, 3) for phase, seconds in timings_s.items()},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in _LIBRARIES}, **(versions or {})},
        "machine": {"platform": platform.platform(), "host": platform.node(), "cpus": os.cpu_count()},
    }
    write_atomically(path, (json.dumps(finite(record), indent=2, allow_nan=False) + "\n").encode())


def finite(value: object) -> object:
    """Return JSON-like content with None where JSON has no number: NaN and infinity."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
