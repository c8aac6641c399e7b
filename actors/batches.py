"""A batch on its way through the pool, and the run it belongs to; knows neither Ray nor replicas.

Invariant: every batch a run takes is handed out once, in the order it was taken.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from threading import get_ident
from typing import Any, Literal, Protocol

import numpy as np

from engine.core.units import LATENT_CHANNELS, LATENT_FACTOR, TILE_LATENT_PX
from engine.sampling.denoiser import DecodeBatch, DecodedBatch, EncodeBatch, EncodedBatch, TileBatch, TilePrediction

Batch = TileBatch | DecodeBatch | EncodeBatch
Value = TilePrediction | DecodedBatch | EncodedBatch


class PoolWatch(Protocol):
    """Who looks on at the pool, for metrics; must not raise."""

    def batch(self, method: str, seconds: float) -> None:
        """Called when a batch is answered, with the replica's seconds of computing."""

    def restart(self) -> None:
        """Called when a replica is lost and replaced."""


@dataclass
class Work:
    """One batch, where its answer belongs, and what became of earlier attempts."""

    run: "Run"
    position: int
    """Place of the batch in its run."""
    batch: Batch
    float32: bool = False
    """Widen a 16-bit model for it."""
    causes: list[str] = field(default_factory=list)
    """Why each earlier attempt failed."""
    avoid: set[int] = field(default_factory=set)
    """Numbers of the replicas that answered wrongly; another one is asked while there is one."""

    def epitaph(self) -> str:
        """Say which batch failed, where and why, for ReplicaLostError."""
        step = f", timestep {self.batch.timestep}" if isinstance(self.batch, TileBatch) else ""
        causes = "; ".join(dict.fromkeys(self.causes))
        return (
            f"Batch {self.batch.key} (tiles {', '.join(map(str, self.batch.tiles))}{step}) must be answered within "
            f"ray.max_attempts={len(self.causes)} attempts; causes: {causes}. What is committed "
            "is kept: mend the cause and start the same command to continue."
        )


@dataclass(eq=False)
class Run:
    """One iteration over batches: what is still to come, to ask again, and to hand out."""

    method: Literal["denoise", "decode", "encode"]
    source: Iterator[Batch | None]
    again: deque[Work] = field(default_factory=deque)
    done: dict[int, Value] = field(default_factory=dict)
    taken: int = 0
    given: int = 0
    exhausted: bool = False
    closed: bool = False
    """Nobody waits for its answers any more."""
    owner: int = field(default_factory=get_ident)
    """The thread that iterates it, and the only one that takes batches from its source."""
    failure: Exception | None = None
    """What a batch of it ended with, where another thread heard of that."""
    _asking: bool = False
    _starved: bool = False

    @property
    def finished(self) -> bool:
        return self.exhausted and self.given == self.taken

    def next_work(self, window: int) -> Work | None:
        """Return a batch to ask again, else a new one unless `window` batches are on their way, else None."""
        if self.again:
            return self.again.popleft()
        if self.exhausted or self._asking or self.taken - self.given >= window:
            return None
        self._asking = True  # the source may use the pool itself
        try:
            found = list(islice(self.source, 1))
        finally:
            self._asking = False
        if not found:
            self.exhausted = True
            return None
        batch = found[0]
        self._starved = batch is None and self.taken == self.given
        if batch is None:
            return None
        self.taken += 1
        return Work(self, self.taken - 1, batch)

    def check(self) -> None:
        """Raise what a batch ended with; RuntimeError if the source waits although every answer was handed out."""
        if self.failure is not None:
            raise self.failure
        if self._starved:
            raise RuntimeError("a source of batches must have one when every answer was taken; got None.")

    @property
    def answered(self) -> bool:
        """Whether the answer whose turn it is, or an end, is here."""
        return self.given in self.done or self.failure is not None

    def next_answer(self) -> Value | None:
        """Hand out the answer whose turn it is, if it is here."""
        value = self.done.pop(self.given, None)
        if value is not None:
            self.given += 1
        return value


def begun(answers: Iterator[Any]) -> Iterator[Any]:
    """Return a generator of answers that has passed its first yield: what it does before that is done."""
    next(answers)
    return answers


@dataclass(frozen=True)
class PoolStats:
    """What the pool has done so far, for progress bars and report.json."""

    batches: int = 0
    compute_s: float = 0.0
    """Seconds of computing, summed over replicas."""
    retries: int = 0
    """Batches evaluated again."""
    float32_retries: int = 0
    """Those of them evaluated in float32 after a non-finite answer."""
    restarts: int = 0
    """Replicas lost and replaced."""
    bytes_sent: int = 0
    bytes_received: int = 0
    replicas: int = 0
    """Replicas that compute now."""
    replicas_starting: int = 0

    @property
    def seconds_per_batch(self) -> float:
        return self.compute_s / self.batches if self.batches else 0.0


def fault_of(batch: Batch, value: Value) -> str | None:
    """Say what is wrong with an answer: another batch's, a wrong shape or a non-finite number; None when nothing is."""
    if value.key != batch.key:
        return f"answer for batch {value.key}"
    if isinstance(batch, TileBatch) and isinstance(value, TilePrediction):
        wanted = [batch.x_t.shape] * (1 if batch.newton is None else 2)
        came = [value.x0] if value.eps is None else [value.x0, value.eps]
    elif isinstance(batch, DecodeBatch) and isinstance(value, DecodedBatch):
        b, c, h, w = batch.latents.shape
        wanted, came = [(b, c, h * LATENT_FACTOR, w * LATENT_FACTOR)], [value.images]
    elif isinstance(batch, EncodeBatch) and isinstance(value, EncodedBatch):
        wanted = [(len(batch.guide.px), LATENT_CHANNELS, TILE_LATENT_PX, TILE_LATENT_PX)]
        came = [value.latents]
    else:
        return f"answer of type {type(value).__name__}"
    shapes = [array.shape for array in came]
    if shapes != wanted:
        return f"wrong shape {shapes}, expected {wanted}"
    finite = np.logical_and.reduce([np.isfinite(array).all(axis=(1, 2, 3)) for array in came])
    if not finite.all():
        return f"non-finite numbers in rows {np.flatnonzero(~finite).tolist()} of the batch"
    return None


def own_copy(value: Value) -> Value:
    """Copy an answer's arrays: those that come from Ray are read-only and hold its store."""
    if isinstance(value, DecodedBatch):
        return replace(value, images=value.images.copy())
    if isinstance(value, EncodedBatch):
        return replace(value, latents=value.latents.copy())
    return replace(value, x0=value.x0.copy(), eps=None if value.eps is None else value.eps.copy())


def nbytes(message: Any) -> int:
    """Return the size of a batch's or an answer's arrays."""
    arrays = list(vars(message).values())
    if isinstance(message, TileBatch) and message.newton is not None:
        arrays.append(message.newton.target)
    return sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its text; Ray's texts run to pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
