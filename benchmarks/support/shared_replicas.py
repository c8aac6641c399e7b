"""Simulated replicas that several pictures of one coordinator share, each led by a thread of its own.

The queueing is the pool's; the clock skips when every picture waits. It does not know pictures.
"""

import heapq
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from benchmarks.support.virtual import IN_FLIGHT, Run, VirtualReplicas
from engine.sampling.denoiser import DecodeBatch, TileBatch

GFLOP = {"denoise": 210.6, "encode": 345.2, "decode": 670.6}
"""Of one call of each network at the published size (docs/results/benchmarks.md)."""
TILES = 16
"""Tiles of the batch that takes batch_s."""


class SharedReplicas(VirtualReplicas):
    """DenoiseTiles for several threads, with the pool's queueing and a clock that skips when all of them wait."""

    def __init__(
        self, replicas: int, batch_s: float, call_s: float, clock: Callable[[], float] = time.process_time,
        own_clock: Callable[[], float] = time.thread_time,
    ) -> None:  # fmt: skip
        """`clock` is the process' and `own_clock` the calling thread's, in seconds."""
        super().__init__(clock)
        self.batch_s, self.call_s, self._own_clock = batch_s, call_s, own_clock
        self.skipped_s = self.computed_s = 0.0
        self.threads = 0
        """Pictures that are led now."""
        self._waiting: dict[Run, int] = {}
        """Of each thread that waits: for which run, and how many answers were to come when it began to."""
        self._changed = threading.Condition()
        self._free_at = [0.0] * replicas
        self._load = [0] * replicas

    def joined(self, count: int) -> None:
        """Note that a picture begins (1) or ends (-1)."""
        with self._changed:
            self.tick()
            self.threads += count
            self._changed.notify_all()

    def _answers(self, run: Run) -> Iterator[Any]:
        """Yield None once, then answers in order: read ahead while a replica has room, as the pool does."""
        with self._changed:
            self._runs.append(run)
        try:
            yield None
            while run.more or run.pending:
                with self._changed:
                    own = [other for other in self._runs if other is run or other.owner == threading.get_ident()]
                crowded = any([self._dispatch(other) for other in reversed(own)])
                answer = self._next(run, crowded)
                if answer is not None:
                    yield answer
        finally:
            with self._changed:
                self._runs.remove(run)

    def _next(self, run: Run, crowded: bool) -> Any:
        """Return the answer whose turn it is; None if something else happened first, such as room."""
        with self._changed:
            if run.pending and run.pending[0][0] <= self.tick():
                return run.pending.popleft()[1]
            if crowded and self._room() is not None:
                return None
            if not self._coming and not run.pending:
                raise RuntimeError("a source of batches must have one when every answer was taken; got None.")
            self._waiting[run] = len(self._coming)
            while not self._may_go_on(run):
                # One that may go on and was not given the processor yet does not wait: time must not pass it by.
                if len(self._waiting) == self.threads and not any(map(self._may_go_on, self._waiting)):
                    self._skip()
                else:
                    self._changed.wait(0.001)
                    self._settle()
            del self._waiting[run]
        return None

    def _may_go_on(self, run: Run) -> bool:
        """Whether a waiting thread has its answer, or some replica has answered since it began to wait."""
        return bool(run.pending and run.pending[0][0] <= self.now) or len(self._coming) < self._waiting[run]

    def _skip(self) -> None:
        """Let time pass to the next answer: every picture waits. Their threads' bands count as the core's work."""
        if self._coming:
            self.skipped_s += max(0.0, self._coming[0][0] - self.now)
            self.now = max(self.now, self._coming[0][0])
        self._settle()
        self._changed.notify_all()

    def _settle(self) -> None:
        """Note the answers that are there by now."""
        self.tick()
        while self._coming and self._coming[0][0] <= self.now:
            self._load[heapq.heappop(self._coming)[1]] -= 1

    def _room(self) -> int | None:
        """Return the least busy replica with room."""
        self._settle()
        at = min(range(len(self._load)), key=self._load.__getitem__)
        return at if self._load[at] < IN_FLIGHT else None

    def _dispatch(self, run: Run) -> bool:
        """Queue a run's batches while a replica has room; say whether it was room that ended it."""
        while run.more and not run.asking and len(run.pending) < 2 * IN_FLIGHT * len(self._load):
            with self._changed:
                if self._room() is None:
                    return True
            if run.held is None:
                run.asking = True
                found = list(islice(run.source, 1))
                run.asking, run.more = False, bool(found)
                run.held = found[0] if found else None
                if run.held is None:
                    return False
            begin = self._own_clock()
            answer = run.answer_to(run.held)
            spent = self._own_clock() - begin
            with self._changed:
                at = self._room()  # looked up again: the source, or a thread, may have used the replicas
                if at is None:
                    return True
                # The clock counted the making up of the answer, which is not the coordinator's work; the call is.
                self.now += self.call_s - spent
                self._send(at, run, answer)
        return False

    def _send(self, at: int, run: Run, answer: Any) -> None:
        seconds = self.seconds_of(run.held)
        self._free_at[at] = finish = max(self.tick(), self._free_at[at]) + seconds
        heapq.heappush(self._coming, (finish, at))
        self._load[at] += 1
        run.pending.append((finish, answer))
        run.held = None
        self.batches += 1
        self.computed_s += seconds

    def seconds_of(self, batch: Any) -> float:
        """Return what a batch takes a replica: batch_s for 16 tiles with both contexts, others by their FLOP."""
        if isinstance(batch, TileBatch):
            gflop = len(batch.x_t) * GFLOP["denoise"] * (2 if batch.weight else 1)
        elif isinstance(batch, DecodeBatch):
            gflop = len(batch.latents) * GFLOP["decode"]
        else:
            gflop = len(batch.guide.px) * GFLOP["encode"]
        return self.batch_s * gflop / (TILES * 2 * GFLOP["denoise"])
