"""Latents → RGB in overlapping windows, streamed row by row; a picture of any size in bounded memory.

It does not know levels, passes or files. Source: ZoomLDM's large decoder: Gaussian-weighted windows.
"""

from collections.abc import Iterator

import numpy as np

from engine.blend import RowAverager, gaussian_weight
from engine.magnification import LATENT_FACTOR, TILE_LATENT_PX, TILE_PX
from engine.predict import DecodeBatch, DenoiseTiles
from engine.strips import ReadRows, gather_tiles
from engine.tiles import Tiling


def decode_rows(
    read: ReadRows,
    size: tuple[int, int],
    tiling: Tiling,
    denoiser: DenoiseTiles,
    sigma: float,
    key: str,
    start: int = 0,
) -> Iterator[np.ndarray]:
    """Yield the picture from latent row `start` on, top to bottom: float32 (3, n, 4·width), not clamped.

    `size` is (height, width) in latent px. Batches are the same whatever `start` is; those above it are skipped.
    """
    height, width = size
    first_row = next(r for r, y in enumerate(tiling.ys) if y + TILE_LATENT_PX > start)
    first_tile = first_row * len(tiling.xs)
    batches = [b for b in tiling.batches() if b[-1] >= first_tile]
    averager = RowAverager(3, width * LATENT_FACTOR, gaussian_weight(TILE_PX, sigma))
    averager.y0 = tiling.ys[first_row] * LATENT_FACTOR
    surplus = (start - tiling.ys[first_row]) * LATENT_FACTOR
    windows = (DecodeBatch(f"{key}/{b[0] // tiling.batch_size}", b, gather_tiles(read, tiling, b)) for b in batches)
    for tiles, answer in zip(batches, denoiser.decode(windows), strict=True):
        for tile, image in zip(tiles, answer.images, strict=False):
            if tile < first_tile:
                continue
            y, x = tiling.corner(tile)
            averager.add(y * LATENT_FACTOR, x * LATENT_FACTOR, image)
            rows = averager.pop(tiling.finished_rows(tile, height) * LATENT_FACTOR)
            drop = min(surplus, rows.shape[1])
            surplus -= drop
            if rows.shape[1] > drop:
                yield rows[:, drop:]


def to_uint8(rows: np.ndarray) -> np.ndarray:
    """Map [−1, 1] to 0..255, truncating as the published recipe does."""
    return (np.clip((rows + 1) / 2, 0, 1) * 255).astype(np.uint8)
