"""Rows in, tiles and bands out: how a canvas larger than memory is walked from top to bottom.

It does not know where rows come from or what is done with them. Units: latent px unless said.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from engine.magnification import TILE_LATENT_PX
from engine.tiles import Tiling

ReadRows = Callable[[int, int], np.ndarray]
"""(y0, y1) → float32 (3, y1−y0, width)."""


class BandReader:
    """Read rows through the last three bands read: tile rows overlap, and a chunk is a band high."""

    def __init__(self, read: ReadRows, height: int, band: int) -> None:
        self._read, self._height, self._band = read, height, band
        self._held: dict[int, np.ndarray] = {}

    def __call__(self, y0: int, y1: int) -> np.ndarray:
        """Return rows y0..y1, float32 (3, y1−y0, width); they must not be written to."""
        first, last = y0 // self._band, (y1 - 1) // self._band
        parts = []
        for i in range(first, last + 1):
            rows = self._hold(i)
            top = i * self._band
            parts.append(rows[:, max(y0 - top, 0) : y1 - top])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _hold(self, i: int) -> np.ndarray:
        if i not in self._held:
            while len(self._held) >= 3:
                del self._held[next(iter(self._held))]
            self._held[i] = self._read(i * self._band, min((i + 1) * self._band, self._height))
        return self._held[i]


def gather_tiles(read: ReadRows, tiling: Tiling, tiles: tuple[int, ...]) -> np.ndarray:
    """Return the windows of a batch, the last one repeated up to the batch size: float32 (B, 3, 64, 64).

    A short batch is padded because another shape would take other kernels and change the last bits.
    """
    found = []
    for tile in tiles:
        y, x = tiling.corner(tile)
        found.append(read(y, y + TILE_LATENT_PX)[:, :, x : x + TILE_LATENT_PX])
    return np.stack(found + found[-1:] * (tiling.batch_size - len(found)))


def in_bands(
    chunks: Iterable[np.ndarray], height: int, band: int, halo: int
) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Regroup row chunks (C, n, w) into bands with up to `halo` rows around them.

    Yields (top, y0, y1, rows): rows start at top = max(y0 − halo, 0) and reach min(y1 + halo, height).
    """
    held = np.zeros((0, 0, 0), np.float32)
    top = y0 = 0
    for chunk in chunks:
        held = np.concatenate([held, chunk], axis=1) if held.size else chunk
        while y0 < height:
            y1 = min(y0 + band, height)
            bottom = min(y1 + halo, height)
            if top + held.shape[1] < bottom:
                break
            yield top, y0, y1, held[:, : bottom - top]
            keep = max(y1 - halo, 0)
            held, top, y0 = held[:, keep - top :], keep, y1
