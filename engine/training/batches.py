"""Which patches a step trains on, at which times, and their arrays read ahead of need.

Invariant: what a step trains on is a pure function of (seed, step), drawn for the whole step; workers and parts take
their shares of it, so neither their number nor a restart changes it. It does not know networks.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.core.errors import PreparedError
from engine.datasets.dataset import PreparedSet
from engine.training.denoiser.settings import JointSettings
from engine.training.optimisation import TrainingError, step_rng

SAMPLES, NOISE = 10, 11
"""Stage numbers: they keep the random streams of draws and noise apart."""
TIMES = 1000

T = TypeVar("T")


class Sample(NamedTuple):
    """One patch of a step: magnification index, patch within it, timestep, and whether its condition is dropped."""

    level: int
    patch: int
    time: int
    dropped: bool
    number: int
    """Its place in the step, which its noise follows from."""


class PatchSource:
    """The patches a model is trained on: a prepared set, by the model's magnification indexes."""

    def __init__(self, data: PreparedSet, magnifications: Sequence[str], side: int) -> None:
        """side: cells that a condition has at most on each axis (8 for a Summarizer, 1 for a token conditioner)."""
        self.data, self.side, self.names = data, side, tuple(magnifications)
        self.levels = [data.magnifications.index(name) for name in magnifications]

    def count(self, level: int) -> int:
        """Return how many patches a magnification has."""
        return self.data.count(self.levels[level])

    def read(self, level: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return latents float32 (3, 64, 64) and the grid float32 (D, ≤side, ≤side). Raises PreparedError."""
        latent, grid, _ = self.data.example(self.levels[level], index, side=self.side)
        return latent, grid

    def name(self, level: int, index: int) -> str:
        """Return where a patch lies, for messages."""
        slide, y, x = self.data.place(self.levels[level], index)
        return f"{slide} {self.names[level]} patch {index} (cell {y}, {x})"

    def weights(self, given: Sequence[float]) -> np.ndarray:
        """Return the chance of each magnification, all alike if none is given.

        Raises: PreparedError for one that has a chance and no patches; TrainingError for another number of weights.
        """
        weights = given or (1.0,) * len(self.levels)
        if len(weights) != len(self.levels):
            raise TrainingError(
                f"train.magnification_weights must be {len(self.levels)} numbers, for {', '.join(self.names)}; got "
                f"{len(weights)}."
            )
        for level, weight in zip(self.levels, weights, strict=True):
            if weight:
                self.data.require_patches(level)
        return np.array(weights) / sum(weights)


def draw_samples(
    chances: np.ndarray, counts: Sequence[int], settings: JointSettings, key: tuple[int, int]
) -> list[Sample]:
    """Draw what a step trains on; key: (seed, step).

    Times are stratified (one per 1000/B wide stratum, shuffled): the loss depends on the time more than on anything
    else, so this removes most of its noise at no cost.
    """
    rng, size = step_rng(key[0], SAMPLES, key[1]), settings.batch_size
    levels = rng.choice(len(chances), size=size, p=chances)
    indexes = [int(rng.integers(counts[level])) for level in levels]
    times = (rng.permutation(size) + rng.random(size)) / size * TIMES
    dropped = rng.random(size) < settings.drop_condition
    return [
        Sample(int(level), index, int(time), bool(drop), number)
        for number, (level, index, time, drop) in enumerate(zip(levels, indexes, times, dropped, strict=True))
    ]


@dataclass(frozen=True)
class DenoiserPart:
    """What one worker computes at once; B samples of a step."""

    samples: Sequence[Sample]
    step: int
    x0: Tensor
    noise: Tensor
    cells: list[Tensor]
    """Prepared grids."""

    @property
    def times(self) -> Tensor:
        return torch.tensor([s.time for s in self.samples])

    @property
    def levels(self) -> list[int]:
        return [s.level for s in self.samples]

    @property
    def dropped(self) -> Tensor:
        return torch.tensor([s.dropped for s in self.samples])

    def pinned(self) -> "DenoiserPart":
        """Return it in page-locked memory, from which copies to a GPU do not wait."""
        cells = [cell.pin_memory() for cell in self.cells]
        return DenoiserPart(self.samples, self.step, self.x0.pin_memory(), self.noise.pin_memory(), cells)


def read_part(
    source: PatchSource, samples: Sequence[Sample], key: tuple[int, int], prepare: Callable[[Tensor], Tensor]
) -> DenoiserPart:
    """Read a share of a step; key: (seed, step). `prepare` is the conditioner's. Raises: PreparedError."""
    latents, cells, noise = [], [], []
    for sample in samples:
        latent, grid = source.read(sample.level, sample.patch)
        try:
            cells.append(prepare(torch.from_numpy(grid)))
        except ValueError as error:
            raise PreparedError(f"{source.name(sample.level, sample.patch)}: {error}") from error
        latents.append(torch.from_numpy(latent))
        rng = np.random.default_rng(np.random.SeedSequence((key[0], NOISE, key[1], sample.number)))
        noise.append(torch.from_numpy(rng.standard_normal(latent.shape, dtype=np.float32)))
    return DenoiserPart(list(samples), key[1], torch.stack(latents), torch.stack(noise), cells)


def ahead(load: Callable[[int], T], numbers: Iterable[int], threads: int) -> Generator[T, None, None]:
    """Yield load(n) in order, with `threads` of them at work ahead; 0 loads when asked. Errors come in turn."""
    if threads == 0:
        yield from map(load, numbers)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="patches") as pool:
        begun: deque[Future[T]] = deque()
        try:
            for number in numbers:
                begun.append(pool.submit(load, number))
                if len(begun) > threads + 1:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
