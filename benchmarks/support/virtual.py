"""What simulated replicas have in common: answers of the pointwise denoiser, and a clock that can skip.

It does not know how batches are queued: that is each simulation's own.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from actors.batches import begun
from engine.sampling.denoiser import (
    DecodeBatch,
    DecodedBatch,
    EncodeBatch,
    EncodedBatch,
    PointwiseDenoiser,
    TileBatch,
    TilePrediction,
)

IN_FLIGHT = 2
"""Batches queued per replica, ray.in_flight's default."""


@dataclass(eq=False)
class Run:
    """One iteration over batches, as in the pool."""

    source: Iterator[Any]
    answer_to: Callable[[Any], Any]
    owner: int = field(default_factory=threading.get_ident)
    """The thread that iterates it."""
    held: Any = None
    """A batch that was asked for and not sent."""
    pending: deque[tuple[float, Any]] = field(default_factory=deque)
    """(time of the answer, answer), in order."""
    more: bool = True
    asking: bool = False


class VirtualReplicas(ABC):
    """DenoiseTiles whose answers are there at times of a virtual clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives the seconds that count as they pass; the rest is skipped."""
        self.clock, self.now, self.batches = clock, 0.0, 0
        self._inner = PointwiseDenoiser()
        self._runs: list[Run] = []
        self._coming: list[tuple[float, int]] = []
        """Heap of (time of an answer, replica)."""
        self._mark = clock()

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        return begun(self._answers(Run(iter(batches), lambda batch: next(self._inner.denoise([batch])))))

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        return begun(self._answers(Run(iter(batches), lambda batch: next(self._inner.decode([batch])))))

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        return begun(self._answers(Run(iter(batches), lambda batch: next(self._inner.encode([batch])))))

    def start(self) -> None:
        """Begin to count."""
        self._mark = self.clock()

    def tick(self) -> float:
        """Add what passed since the last look; return the time."""
        mark, self._mark = self._mark, self.clock()
        self.now += self._mark - mark
        return self.now

    @abstractmethod
    def _answers(self, run: Run) -> Iterator[Any]:
        """Yield None once, then a run's answers in order."""
