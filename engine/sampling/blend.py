"""Tile weights, and averaging of overlapping tiles in tile order, row by row.

Invariants: every px has weight > 0; constant in = constant out; sums run in the order of
`add`, so the bytes do not depend on when predictions arrive. It does not know latents from pixels.
Source: MultiDiffusion (Bar-Tal et al. 2023).
"""

import numpy as np
from jaxtyping import Float, Float32


def uniform_weight(size: int) -> Float32[np.ndarray, "{size} {size}"]:
    """Return ones (size, size)."""
    return np.ones((size, size), np.float32)


def smooth_weight(size: int) -> Float32[np.ndarray, "{size} {size}"]:
    """Return the outer product of two raised cosines (size, size), positive everywhere."""
    axis = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    # The floor keeps canvas corners, which only one tile's corner covers, away from division by almost nothing.
    axis = np.maximum(axis, 1e-3)
    return np.outer(axis, axis).astype(np.float32)


def gaussian_weight(size: int, sigma: float) -> Float32[np.ndarray, "{size} {size}"]:
    """Return exp(−r²/sigma²), scaled to a peak of 1, r the distance from the centre in half-widths (size, size)."""
    axis = np.linspace(-1, 1, size)
    weight = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / sigma**2)
    return (weight / weight.max()).astype(np.float32)


class RowAverager:
    """Average tiles of one size over a canvas, holding only the rows that are still open.

    Tiles must be added top row first; `pop(y)` returns the finished rows above y.
    """

    def __init__(self, channels: int, width: int, weight: Float32[np.ndarray, "size size"]) -> None:
        self._weight = weight
        self._size = weight.shape[0]
        self._sum = np.zeros((channels, 0, width), np.float32)
        self._mass = np.zeros((1, 0, width), np.float32)
        self.y0 = 0
        """First row not popped yet."""

    def add(self, y: int, x: int, tile: Float[np.ndarray, "channels size size"]) -> None:
        """Add one tile (channels, size, size) with its top-left at (y, x). Raises ValueError above the popped rows."""
        if y < self.y0:
            raise ValueError(f"tiles must come top row first; got y={y} after rows below {self.y0} were closed.")
        missing = y + self._size - (self.y0 + self._sum.shape[1])
        if missing > 0:
            self._sum = _with_rows(self._sum, missing)
            self._mass = _with_rows(self._mass, missing)
        window = np.s_[:, y - self.y0 : y - self.y0 + self._size, x : x + self._size]
        self._sum[window] += self._weight * tile
        self._mass[window] += self._weight

    def pop(self, y: int) -> Float32[np.ndarray, "channels rows width"]:
        """Return the averages of rows [y0, y) as float32 (channels, y−y0, width) and forget them.

        Raises: ValueError if a px has no weight; names the first one.
        """
        rows = max(min(y - self.y0, self._sum.shape[1]), 0)
        mass = self._mass[:, :rows]
        if not rows:  # after most tiles; the rows below must not be copied then
            return self._sum[:, :0]
        if not mass.all():
            _, bad_y, bad_x = np.argwhere(mass == 0)[0]
            raise ValueError(f"every px must be covered by a tile; (y={self.y0 + bad_y}, x={bad_x}) is not.")
        out = self._sum[:, :rows] / mass
        self._sum, self._mass = self._sum[:, rows:].copy(), self._mass[:, rows:].copy()
        self.y0 += rows
        return out


def _with_rows(array: np.ndarray, rows: int) -> np.ndarray:
    extra = np.zeros((array.shape[0], rows, array.shape[2]), array.dtype)
    return np.concatenate([array, extra], axis=1)
