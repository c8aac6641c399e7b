"""Who works on slides: workers plan and read, encoders compute; in this process here, on Ray in actors/.

A task becomes a slide's plan and its blocks, a block its pixels, pixels a result; whatever fails becomes a
`SlideFailure`, data like the others. It does not know what blocks hold or what results are for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from engine.config import ModelConfigSection, RayConfig
from engine.devices import Hardware, choose_device, hardware_of, keep_freed_memory, pin_arithmetic


@dataclass(frozen=True)
class SlideFailure:
    """Why a slide cannot be done."""

    slide: str
    path: Path
    code: str
    message: str


class BlockResult(ABC):
    """What every block's result says about itself; a base of frozen dataclasses that have these fields."""

    slide: str
    read_s: float
    encode_s: float
    waited_s: float
    """How long the encoder had nothing to do before this block; its first block does not count."""

    @property
    @abstractmethod
    def tiles(self) -> int:
        """How many tiles the block has, of all magnifications."""


class Worker(Protocol):
    """Plans and reads slides in one process."""

    def plan(self, task: Any) -> Iterator[Any]:
        """Yield the plan of a slide and then its blocks, or a SlideFailure."""
        ...

    def read(self, block: Any) -> Any:
        """Return the pixels of a block, or a SlideFailure."""
        ...


class Encoder(Protocol):
    """Computes blocks; lives as long as its process."""

    def encode(self, pixels: Any) -> Any:
        """Return a BlockResult or a SlideFailure."""
        ...


class SlidesConfig(Protocol):
    """The keys that all commands over slides have."""

    @property
    def slides(self) -> str: ...
    @property
    def out(self) -> str: ...
    @property
    def overrides(self) -> str | None: ...
    @property
    def tissue(self) -> str | None: ...
    @property
    def model(self) -> ModelConfigSection: ...
    @property
    def ray(self) -> RayConfig: ...


class Stages(Protocol):
    """What a process needs to do its part; hashable, and small enough to travel with every task."""

    @property
    def config(self) -> SlidesConfig: ...

    block: ClassVar[type]
    """What is read; everything else passes by."""
    pixels: ClassVar[type]
    """What is encoded; everything else passes by."""

    def worker(self) -> Worker:
        """Build the worker of a process. Raises EngineError."""
        ...

    def encoder(self, device: str) -> Encoder:
        """Load the networks. Raises EngineError."""
        ...


@dataclass(frozen=True)
class Crew:
    """Who plans, reads and encodes. `work` yields of each task its plan and all its blocks, or a failure."""

    work: Callable[[Sequence[Any]], Iterator[Any]]
    hardware: Hardware
    """Of an encoder."""
    replicas: Callable[[], int]


@contextmanager
def work_alone(stages: Stages) -> Iterator[Crew]:
    """Plan, read and encode in this process, one block read ahead; the specification of every other crew."""
    section = stages.config.model
    device = choose_device(section.device)
    pin_arithmetic(section.threads)
    keep_freed_memory(device)
    worker, encoder = stages.worker(), stages.encoder(device)
    yield Crew(lambda tasks: _work(stages, worker, encoder, tasks), hardware_of(device), lambda: 1)


def _work(stages: Stages, worker: Worker, encoder: Encoder, tasks: Sequence[Any]) -> Iterator[Any]:
    source = _pixels(stages, worker, tasks)
    with ThreadPoolExecutor(1) as ahead:  # reading releases the interpreter: the next block is read meanwhile
        coming = ahead.submit(next, source, None)
        while (item := coming.result()) is not None:
            coming = ahead.submit(next, source, None)
            yield encoder.encode(item) if isinstance(item, stages.pixels) else item


def _pixels(stages: Stages, worker: Worker, tasks: Sequence[Any]) -> Iterator[Any]:
    """Yield plans, pixels and failures; of a slide that failed, nothing more."""
    for task in tasks:
        for planned in worker.plan(task):
            if not isinstance(planned, stages.block):
                yield planned
                continue
            pixels = worker.read(planned)
            yield pixels
            if isinstance(pixels, SlideFailure):
                break
