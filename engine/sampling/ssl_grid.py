"""From one grid of SSL vectors to the vectors of one tile, on and between cells.

Invariant: a tile that lies on the cell grid gets exactly its cells. It does not know networks; the Summarizer pools and
standardises. Source: ZoomLDM and its predecessor (CVPR 2024): slerp-bilinear mix of the four nearest cells.
"""

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from engine.core.units import TILE_LATENT_PX

MAX_CELLS = 8
"""The Summarizer reads at most 8×8 cells; larger grids are averaged down before they travel."""
_PARALLEL = 0.9995


def slerp(
    a: Float32[np.ndarray, "*shape"], b: Float32[np.ndarray, "*shape"], f: float | NDArray[np.float64], axis: int = 0
) -> Float32[np.ndarray, "*shape"]:
    """Interpolate along the great circle between the vectors of a and b; lerp where nearly parallel.

    Vectors lie along `axis`; an array f (one fraction each) has length 1 there. f = 0 gives a, to the bit.
    Source: Shoemake 1985; the 0.9995 bound as in the published recipe.
    """
    if not np.any(f):
        return a
    to_b, to_a = np.float32(f), np.float32(1 - f)
    norms = np.linalg.norm(a, axis=axis, keepdims=True) * np.linalg.norm(b, axis=axis, keepdims=True)
    cosine = np.clip((a * b).sum(axis, keepdims=True) / np.maximum(norms, 1e-12), -1, 1)
    lerp = np.abs(cosine) > _PARALLEL
    theta = np.arccos(np.where(lerp, np.float32(0), cosine))
    sine = np.sin(theta)
    wa = np.where(lerp, to_a, np.sin(to_a * theta) / sine)
    wb = np.where(lerp, to_b, np.sin(to_b * theta) / sine)
    mixed = (wa * a + wb * b).astype(np.float32)
    return mixed if np.all(f) else np.where(np.equal(f, 0), a, mixed)


def extend_grid(
    grid: Float32[np.ndarray, "d h w"], cells_h: int, cells_w: int
) -> Float32[np.ndarray, "d larger_h larger_w"]:
    """Mirror a (D, h, w) grid to at least (D, cells_h, cells_w), where a coarse tile sees past the canvas."""
    pad_h, pad_w = max(cells_h - grid.shape[1], 0), max(cells_w - grid.shape[2], 0)
    return np.pad(grid, ((0, 0), (0, pad_h), (0, pad_w)), mode="symmetric")


def _axis(start: float, count: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], float]:
    """Return the lower cells, upper cells and the fraction between them; the last cell is repeated past the edge."""
    first = int(np.floor(start))
    lower = np.clip(np.arange(first, first + count), 0, size - 1)
    return lower, np.minimum(lower + 1, size - 1), start - first


def tile_cells(grid: Float32[np.ndarray, "d h w"], y: int, x: int, factor: int) -> Float32[np.ndarray, "d n n"]:
    """Return the cells under one tile: float32 (D, n, n), n = min(factor, 8).

    `grid` is (D, h, w) over base cells; (y, x) is the tile's top-left in latent px of its own level, `factor` that
    level's factor.
    """
    top, bottom, fy = _axis(y * factor / TILE_LATENT_PX, factor, grid.shape[1])
    left, right, fx = _axis(x * factor / TILE_LATENT_PX, factor, grid.shape[2])
    upper = slerp(grid[:, top][:, :, left], grid[:, top][:, :, right], fx)
    lower = slerp(grid[:, bottom][:, :, left], grid[:, bottom][:, :, right], fx)
    cells = slerp(upper, lower, fy)
    if factor > MAX_CELLS:
        share = factor // MAX_CELLS
        depth, height, width = cells.shape
        cells = cells.reshape(depth, height // share, share, width // share, share).mean(axis=(2, 4))
    return np.ascontiguousarray(cells, dtype=np.float32)


def _fine_cells(grid: NDArray[np.float32], corners: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return the cell of each tile of the base level, (B, D, 1, 1), to the bit what `tile_cells` gives one by one.

    `corners` is (B, 2). All tiles are mixed at once: there are more of them than of all other levels together.
    """
    at = corners / TILE_LATENT_PX
    first = np.floor(at).astype(np.intp)
    fy, fx = (at - first).T[..., None]
    last = np.array(grid.shape[1:]) - 1
    (top, left), (bottom, right) = np.clip(first, 0, last).T, np.minimum(np.clip(first, 0, last) + 1, last).T

    def cells(y: NDArray[np.intp], x: NDArray[np.intp]) -> NDArray[np.float32]:
        return np.ascontiguousarray(grid[:, y, x].T)  # (B, D): sums run along memory, as over one tile's vector

    upper = slerp(cells(top, left), cells(top, right), fx, axis=1)
    lower = slerp(cells(bottom, left), cells(bottom, right), fx, axis=1)
    return slerp(upper, lower, fy, axis=1)[..., None, None]


class TileVectors:
    """The SSL vectors of batches of tiles over one grid (D, h, w); every step asks for the same."""

    def __init__(self, grid: Float32[np.ndarray, "d h w"], kept_nbytes: int = 128 * 2**20) -> None:
        """Up to `kept_nbytes` are kept, of what is asked for first: coarse levels, whose tiles mix factor² cells."""
        self._grid, self._room = grid, kept_nbytes
        self._kept: dict[tuple[int, tuple[tuple[int, int], ...]], NDArray[np.float32]] = {}

    def under(self, corners: list[tuple[int, int]], factor: int) -> Float32[np.ndarray, "b d n n"]:
        """Return the vectors under tiles of a level, float32 (B, D, n, n) as `tile_cells` gives them."""
        key = factor, tuple(corners)
        if key in self._kept:
            return self._kept[key]
        if factor == 1:
            cells = _fine_cells(self._grid, np.array(corners))
        else:
            cells = np.stack([tile_cells(self._grid, y, x, factor) for y, x in corners])
        if cells.nbytes <= self._room:
            self._kept[key] = cells
            self._room -= cells.nbytes
        return cells
