"""Rows in, tiles and bands out: how a canvas larger than memory is walked from top to bottom, bands in threads.

It does not know where rows come from or what is done with them. Units: latent px unless said.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from engine.core.units import LATENT_FACTOR


@dataclass(frozen=True)
class Box:
    """Rows y0..y1 and columns x0..x1 of a picture or a level."""

    y0: int
    x0: int
    y1: int
    x1: int

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.y1 - self.y0, self.x1 - self.x0

    @classmethod
    def parse(cls, text: str) -> "Box":
        """Read "x,y,width,height", the order of viewers. Raises ValueError."""
        try:
            x, y, width, height = (int(part) for part in text.split(","))
        except ValueError as error:
            raise ValueError(f"region must be x,y,width,height in whole px; got {text!r}.") from error
        return cls(y, x, y + height, x + width)

    @property
    def xywh(self) -> list[int]:
        """[x, y, width, height]."""
        return [self.x0, self.y0, self.x1 - self.x0, self.y1 - self.y0]

    def moved(self, y: int, x: int) -> "Box":
        """Return the same box seen from (y, x)."""
        return Box(self.y0 - y, self.x0 - x, self.y1 - y, self.x1 - x)

    def within(self, other: "Box") -> "Box":
        """Return what both boxes share; empty when they do not touch."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        return Box(y0, x0, max(min(self.y1, other.y1), y0), max(min(self.x1, other.x1), x0))

    def latent(self) -> "Box":
        """Return the latent px under a box of px."""
        f = LATENT_FACTOR
        return Box(self.y0 // f, self.x0 // f, -(-self.y1 // f), -(-self.x1 // f))


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
        parts: list[np.ndarray] = []
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


def in_bands(
    chunks: Iterable[np.ndarray], height: int, band: int, halo: int, start: int = 0
) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Regroup row chunks (C, n, w) into bands with up to `halo` rows around them.

    Yields (top, y0, y1, rows): rows start at top = max(y0 − halo, 0) and reach min(y1 + halo, height). With `start`, a
    multiple of the band, the chunks begin at the top of the band that begins there.
    """
    parts: list[np.ndarray] = []
    top = reached = max(start - halo, 0)
    y0 = start
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


class Workers:
    """Some threads, alive inside `with`; leaving it waits for what is at work and drops what is not begun."""

    def __init__(self, threads: int = 2, limit: int = 3) -> None:
        """At most `limit` pieces of work are under way: at 65536² one holds about 0.25 GB."""
        self._threads, self._limit = threads, limit
        self._executor: ThreadPoolExecutor | None = None
        self._under_way: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        self._executor = ThreadPoolExecutor(self._threads, "bands")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        assert self._executor is not None  # __enter__ made it
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = None
        self._under_way.clear()

    def do(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, when there is room for it. Raises what an earlier piece raised."""
        if self._executor is None:
            raise RuntimeError("work must be given inside `with`; got it outside.")
        while len(self._under_way) >= self._limit:
            self._under_way.popleft().result()
        self._under_way.append(self._executor.submit(work))

    def wait(self) -> None:
        """Return when everything is done. Raises what a piece raised."""
        while self._under_way:
            self._under_way.popleft().result()

    @property
    def idle(self) -> bool:
        """Whether nothing is at work or waits to be."""
        return all(piece.done() for piece in self._under_way)
