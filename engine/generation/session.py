"""A backend at work on one run: who computes, held to where the run began, and how long the coordinator waited for it.

It does not know what is sampled, decoded or written.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from engine.canvas.canvas import Canvas
from engine.canvas.environment import ENVIRONMENT, check_environment
from engine.core.progress import Clock, Progress, RunCallback
from engine.core.runtime import (
    Hardware,
    choose_device,
    facts_of,
    keep_freed_memory,
    pin_arithmetic,
    remark_on_dtype,
    this_process,
)
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig
from engine.sampling.denoiser import (
    DecodeBatch,
    DecodedBatch,
    DenoiseTiles,
    EncodeBatch,
    EncodedBatch,
    LocalDenoiser,
    TileBatch,
    TilePrediction,
)
from engine.sampling.sampler import Sampling, sample_large


@dataclass(frozen=True)
class Backend:
    """Who computes: the denoiser, on what, how many replicas live, facts for the report, and a callback."""

    denoiser: DenoiseTiles
    hardware: Hardware
    """Of the first replica."""
    alive: Callable[[], int]
    facts: Callable[[], dict[str, object]]
    callback: RunCallback | None = None
    """Told of progress and scores; the scores come after the backend has left."""


StartBackend = Callable[[ZoomLDM, RunConfig], AbstractContextManager[Backend]]
"""Puts the model, which lies on the CPU, to work."""


class Session:
    """A backend at work on one run: the denoiser, and facts for the report, which are whole when the session ends."""

    def __init__(self, backend: Backend, clock: Clock) -> None:
        self.denoiser = TimedDenoiser(backend.denoiser)
        self.facts: dict[str, object] = {}
        self._clock = clock
        self._waited_s = 0.0

    def sample(self, s: Sampling) -> None:
        """Denoise the canvas; the time that the coordinator does not wait for answers is orchestration."""
        before = self.denoiser.waited_s
        with self._clock.phase("sampling"):
            sample_large(s)
        self._waited_s = self.denoiser.waited_s - before

    def close(self, backend: Backend, tiles: int, said: dict[str, object]) -> None:
        """Gather the facts while the backend is still there to ask."""
        seconds = max(self._clock.seconds.get("sampling", 0.0), 1e-9)
        share = 1 - self._waited_s / seconds
        self.facts |= {**backend.facts(), **said, "tiles": tiles, "tiles_per_s": tiles / seconds}
        self.facts |= {"orchestration_share": share}


@contextmanager
def session(
    canvas: Canvas, dtypes: tuple[str, str], backend: AbstractContextManager[Backend], progress: Progress, clock: Clock
) -> Iterator[Session]:
    """Put a backend to work on a run, held to where the run began; `dtypes` are model.dtype as asked for and as used.

    Raises: CanvasMismatchError.
    """
    resumed = not canvas.fresh
    with ExitStack() as stack:
        with clock.phase("start"):
            at_work = stack.enter_context(backend)
        stack.callback(progress.close)
        arithmetic = (*dtypes, at_work.hardware)
        said = facts_of(*arithmetic)
        with canvas.shared(ENVIRONMENT):
            check_environment(canvas.folder, said)
        if line := remark_on_dtype(*arithmetic):
            progress.say(line)
        progress.replicas, progress.callback = at_work.alive, at_work.callback
        found = Session(at_work, clock)
        yield found
        found.close(at_work, progress.tile_count, {**said, "resumed": resumed})


@contextmanager
def local_backend(model: ZoomLDM, config: RunConfig) -> Iterator[Backend]:
    """Compute in this process, without Ray (ray.enabled=false)."""
    device = choose_device(config.model.device)
    pin_arithmetic(config.model.threads)
    keep_freed_memory(device)
    denoiser = LocalDenoiser(model.to(device))
    yield Backend(denoiser, this_process(device)(), lambda: 1, lambda: {"replicas": 1, "restarts": 0})


B = TypeVar("B")


A = TypeVar("A")


class TimedDenoiser:
    """DenoiseTiles that measures how long the coordinator waits for answers; the rest is orchestration."""

    def __init__(self, inner: DenoiseTiles) -> None:
        self._inner = inner
        self.waited_s = 0.0
        self._making = Clock()

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        return self._timed(self._inner.denoise(self._watched(batches)))

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        return self._timed(self._inner.decode(self._watched(batches)))

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        return self._timed(self._inner.encode(self._watched(batches)))

    def _watched(self, batches: Iterable[B]) -> Iterator[B]:
        source = iter(batches)
        while True:
            with self._making.phase("batches"):
                found = list(islice(source, 1))
            if not found:
                return
            yield found[0]

    def _timed(self, answers: Iterator[A]) -> Iterator[A]:
        made = self._making.seconds
        while True:
            before, start = made.get("batches", 0.0), time.perf_counter()
            answer = next(answers, None)
            # Batches are cut inside next(), of whichever run; that part is the coordinator's own work.
            self.waited_s += time.perf_counter() - start - (made.get("batches", 0.0) - before)
            if answer is None:
                return
            yield answer
