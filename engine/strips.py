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
    """Read rows through the last two bands read, for a chunk is a band high, and the last rows asked for.

    Tile rows overlap, and each is asked for tile by tile.
    """

    def __init__(self, read: ReadRows, height: int, band: int) -> None:
        self._read, self._height, self._band = read, height, band
        self._held: dict[int, np.ndarray] = {}
        self._asked: tuple[int, int] | None = None
        self._answer = np.empty(0, np.float32)

    def __call__(self, y0: int, y1: int) -> np.ndarray:
        """Return rows y0..y1, float32 (3, y1−y0, width); they must not be written to."""
        if self._asked != (y0, y1):
            self._answer, self._asked = self._rows(y0, y1), (y0, y1)
        return self._answer

    def _rows(self, y0: int, y1: int) -> np.ndarray:
        first, last = y0 // self._band, (y1 - 1) // self._band
        parts = []
        for i in range(first, last + 1):
            rows = self._hold(i)
            top = i * self._band
            parts.append(rows[:, max(y0 - top, 0) : y1 - top])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _hold(self, i: int) -> np.ndarray:
        if i not in self._held:
            while len(self._held) >= 2:
                del self._held[next(iter(self._held))]
            self._held[i] = self._read(i * self._band, min((i + 1) * self._band, self._height))
        return self._held[i]


class ForwardReader:
    """Read rows of a stream that comes top to bottom; no call may ask for rows above an earlier one."""

    def __init__(self, rows: Iterable[np.ndarray]) -> None:
        self._rows = iter(rows)
        self._held: np.ndarray | None = None
        self._top = 0

    def __call__(self, y0: int, y1: int) -> np.ndarray:
        """Return rows y0..y1, float32 (3, y1−y0, width). Raises ValueError when they are gone or never come."""
        if y0 < self._top:
            raise ValueError(f"rows must be read top to bottom; got {y0} after {self._top}.")
        while self._held is None or self._top + self._held.shape[1] < y1:
            part = next(self._rows, None)
            if part is None:
                raise ValueError(f"the stream must reach row {y1}; it ended before.")
            self._held = part if self._held is None else np.concatenate([self._held, part], axis=1)
        self._held, self._top = self._held[:, y0 - self._top :], y0
        return self._held[:, : y1 - y0]


def cut(rows: Iterable[np.ndarray], ys: tuple[int, int], xs: tuple[int, int]) -> Iterator[np.ndarray]:
    """Cut rows ys[0]..ys[1] and columns xs[0]..xs[1] out of a stream of rows (3, n, w)."""
    top = 0
    for part in rows:
        first, last = max(ys[0] - top, 0), min(ys[1] - top, part.shape[1])
        if first < last:
            yield part[:, first:last, xs[0] : xs[1]]
        top += part.shape[1]


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
    parts: list[np.ndarray] = []
    top = y0 = reached = 0
    for chunk in chunks:
        parts.append(chunk)
        reached += chunk.shape[1]
        while y0 < height:
            y1 = min(y0 + band, height)
            bottom = min(y1 + halo, height)
            if reached < bottom:
                break
            held = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            yield top, y0, y1, held[:, : bottom - top]
            keep = max(y1 - halo, 0)
            parts, top, y0 = [held[:, keep - top :].copy()], keep, y1  # a view would keep the whole band in memory
