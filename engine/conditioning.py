"""From one grid of SSL vectors to the vectors of one tile, on and between cells.

Invariant: a tile that lies on the cell grid gets exactly its cells. It does not know networks; the Summarizer pools and
standardises. Source: ZoomLDM and its predecessor (CVPR 2024): slerp-bilinear mix of the four nearest cells.
"""

import numpy as np
from einops import reduce
from numpy.typing import NDArray

from engine.magnification import TILE_LATENT_PX

MAX_CELLS = 8
"""The Summarizer reads at most 8×8 cells; larger grids are averaged down before they travel."""
_PARALLEL = 0.9995


def slerp(a: NDArray[np.float32], b: NDArray[np.float32], f: float) -> NDArray[np.float32]:
    """Interpolate along the great circle between the columns of a and b, both (D, ...); lerp where nearly parallel.

    Source: Shoemake 1985; the 0.9995 bound as in the published recipe.
    """
    if f == 0:
        return a
    norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    cosine = np.clip((a * b).sum(0) / np.maximum(norms, 1e-12), -1, 1)
    lerp = np.abs(cosine) > _PARALLEL
    theta = np.arccos(np.where(lerp, 0.0, cosine))
    sine = np.sin(theta)
    wa = np.where(lerp, 1 - f, np.sin((1 - f) * theta) / sine)
    wb = np.where(lerp, f, np.sin(f * theta) / sine)
    return (wa * a + wb * b).astype(np.float32)


def extend_grid(grid: NDArray[np.float32], cells_h: int, cells_w: int) -> NDArray[np.float32]:
    """Mirror a (D, h, w) grid to at least (D, cells_h, cells_w), where a coarse tile sees past the canvas."""
    pad_h, pad_w = max(cells_h - grid.shape[1], 0), max(cells_w - grid.shape[2], 0)
    return np.pad(grid, ((0, 0), (0, pad_h), (0, pad_w)), mode="symmetric")


def _axis(start: float, count: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], float]:
    """Return the lower cells, upper cells and the fraction between them; the last cell is repeated past the edge."""
    first = int(np.floor(start))
    lower = np.clip(np.arange(first, first + count), 0, size - 1)
    return lower, np.minimum(lower + 1, size - 1), start - first


def tile_cells(grid: NDArray[np.float32], y: int, x: int, factor: int) -> NDArray[np.float32]:
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
        cells = reduce(cells, "d (h a) (w b) -> d h w", "mean", a=share, b=share)
    return np.ascontiguousarray(cells, dtype=np.float32)
