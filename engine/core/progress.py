"""What a user sees of a run's progress: a bar on a terminal, plain lines in a job log; and the clock of the report.

It counts and prints; it decides nothing.
"""

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import NoReturn, Protocol, TextIO

from tqdm.auto import tqdm


class ProgressCallback(Protocol):
    """Who looks on: a progress bar, a log, a clock."""

    def step(self, name: str, done: int, total: int) -> None:
        """Called when `done` of `total` steps of a pass are committed (0: the pass begins)."""

    def tiles(self, count: int) -> None:
        """Called when `count` more tiles are in."""


LINE_EVERY_S = 10.0
"""A job log gets a line per step, but not more often than this."""
Replicas = Callable[[], int]
"""How many replicas are alive now."""


class RunCallback(ProgressCallback, Protocol):
    """A ProgressCallback that hears of the finished picture too (metrics); it must not raise."""

    def judged(self, scores: Mapping[str, object]) -> None:
        """Called with the scores of report.json when they are written."""


class Progress:
    """Show passes, steps and tiles per second. `replicas` and `callback` may be set once they are there."""

    def __init__(self, out: TextIO | None = None, also: RunCallback | None = None) -> None:
        """`also` is told everything too, and stays."""
        self.out = out or sys.stderr
        self._also = also
        self.replicas: Replicas | None = None
        self.callback: RunCallback | None = None
        self.tile_count = 0
        """Tiles evaluated by this process."""
        self._name: str | None = None
        self._bar: tqdm[NoReturn] | None = None
        self._line_at = 0.0
        self._start_s, self._start_tiles, self._start_step = 0.0, 0, 0

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.clear()
        self.out.write(text + "\n")
        self.out.flush()

    def step(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps are committed; a new name begins a new count."""
        for callback in self._callbacks:
            callback.step(name, done, total)
        if name != self._name:
            self._begin(name, done, total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._line_is_due(done, total):
            self._line_at = time.monotonic()
            self.say(f"{name}: step {done}/{total}, {self._speed()}, {self._remaining(done, total)}")
        if done == total:
            self.close()

    def tiles(self, count: int) -> None:
        """Count tiles as they come in."""
        self.tile_count += count
        for callback in self._callbacks:
            callback.tiles(count)
        if self._bar is not None:
            self._bar.set_postfix_str(self._speed(), refresh=False)
            self._bar.update(0)

    def judged(self, scores: Mapping[str, object]) -> None:
        """Pass the scores of the finished picture on."""
        for callback in self._callbacks:
            callback.judged(scores)

    @property
    def _callbacks(self) -> list[RunCallback]:
        return [callback for callback in (self.callback, self._also) if callback is not None]

    def close(self) -> None:
        """Finish the bar; harmless when repeated."""
        if self._bar is not None:
            self._bar.close()
        self._name = self._bar = None

    def _begin(self, name: str, done: int, total: int) -> None:
        self.close()
        self._name = name
        self._start_s, self._start_tiles, self._start_step = time.monotonic(), self.tile_count, done
        if self.out.isatty() or (self.out is sys.stderr and "ipykernel" in sys.modules):
            self._bar = tqdm(desc=name, initial=done, total=total, unit="step", file=self.out)

    def _line_is_due(self, done: int, total: int) -> bool:
        """Say the first step at once and the last; between them, and before them, a sign of life now and then."""
        moved = done > self._start_step
        since = self._line_at if moved else max(self._line_at, self._start_s)
        return (moved and done == total) or time.monotonic() - since >= LINE_EVERY_S

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self._start_s, 1e-9)
        text = f"{(self.tile_count - self._start_tiles) / seconds:.1f} tiles/s"
        return text if self.replicas is None else f"{text}, {self.replicas()} replica(s) alive"

    def _remaining(self, done: int, total: int) -> str:
        if done == self._start_step:
            return "time left not known yet"
        each = (time.monotonic() - self._start_s) / (done - self._start_step)
        return f"{(total - done) * each:.0f} s left"


class Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Add what passes inside to a phase, on error too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
