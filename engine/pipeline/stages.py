"""Who works on slides: workers plan and read, encoders compute; in this process here, on Ray in actors/.

A task becomes a slide's plan and its blocks, a block its pixels, pixels a result; whatever fails becomes a
`SlideFailure`, data like the others. It does not know what blocks hold or what results are for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from engine.core.config import ModelConfigSection, RayConfig
from engine.core.errors import EngineError
from engine.core.runtime import Hardware, choose_device, hardware_of, keep_freed_memory, pin_arithmetic
from engine.slides.boundary import one_slide


@dataclass(frozen=True)
class SlideFailure:
    """Why a slide cannot be done."""

    slide: str
    path: Path
    code: str
    message: str


class OfSlide(Protocol):
    """What every task and every block says about itself."""

    @property
    def slide(self) -> str: ...
    @property
    def path(self) -> Path: ...


class OfBlock(Protocol):
    """What all pixels of a block say about themselves."""

    @property
    def block(self) -> OfSlide: ...


class SlidePlan(ABC):
    """What every plan of a slide says about itself; a base of frozen dataclasses that have these fields."""

    slide: str
    path: Path
    seconds: float
    """Of planning."""

    @property
    @abstractmethod
    def to_come(self) -> int:
        """How many blocks follow."""


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


Message = SlidePlan | BlockResult | SlideFailure
"""What arrives where results are written: of each slide its plan, then its blocks in any order; or a failure."""
Passing = SlidePlan | SlideFailure
"""What no later stage works on."""
Task = TypeVar("Task", bound=OfSlide)
Block = TypeVar("Block", bound=OfSlide)
Pixels = TypeVar("Pixels", bound=OfBlock)
TaskIn = TypeVar("TaskIn", bound=OfSlide, contravariant=True)
PixelsIn = TypeVar("PixelsIn", bound=OfBlock, contravariant=True)
PixelsOut = TypeVar("PixelsOut", bound=OfBlock, covariant=True)


class Worker(Protocol[TaskIn, Block, PixelsOut]):
    """Plans and reads slides in one process."""

    def plan(self, task: TaskIn) -> Iterator[Passing | Block]:
        """Yield the plan of a slide and then its blocks, or a SlideFailure."""
        ...

    def read(self, block: Block) -> PixelsOut | SlideFailure:
        """Return the pixels of a block, or a SlideFailure."""
        ...


class Encoder(Protocol[PixelsIn]):
    """Computes blocks; lives as long as its process."""

    def encode(self, pixels: PixelsIn) -> BlockResult | SlideFailure:
        """Return what results are made of, or a SlideFailure."""
        ...


class SlidesConfig(Protocol):
    """The keys that all commands over slides have, in a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

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


class Stages(Protocol[TaskIn, Block, Pixels]):
    """What a process needs to do its part; a frozen dataclass, hashable and small enough to travel with every task."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def config(self) -> SlidesConfig: ...

    def worker(self) -> Worker[TaskIn, Block, Pixels]:
        """Build the worker of a process. Raises EngineError."""
        ...

    def encoder(self, device: str) -> Encoder[Pixels]:
        """Load the networks. Raises EngineError."""
        ...


class Work(Protocol[TaskIn]):
    """Does tasks."""

    def __call__(self, tasks: Sequence[TaskIn], given_up: Collection[str] = ()) -> Iterator[Message]:
        """Yield of each task its plan and all its blocks, or a failure.

        `given_up` names slides that the caller has stopped waiting for, and grows while this works: nothing more of
        them is read or encoded, but for what is on its way.
        """
        ...


@dataclass(frozen=True)
class Backend(Generic[Task]):
    """Who plans, reads and encodes."""

    work: Work[Task]
    hardware: Hardware
    """Of an encoder."""
    replicas: Callable[[], int]


def plan_safely(worker: Worker[Task, Block, Pixels], task: Task) -> Iterator[Passing | Block]:
    """Yield what `worker.plan` does; an exception of any type ends the slide with a SlideFailure, and nothing else."""
    try:
        with one_slide(task.slide, task.path, "opened and planned"):
            yield from worker.plan(task)
    except EngineError as error:
        yield _failure(task, error)


def read_safely(worker: Worker[Task, Block, Pixels], block: Block) -> Pixels | SlideFailure:
    """Return what `worker.read` does; a SlideFailure for an exception of any type."""
    try:
        with one_slide(block.slide, block.path, "read"):
            return worker.read(block)
    except EngineError as error:
        return _failure(block, error)


def encode_safely(encoder: Encoder[Pixels], pixels: Pixels) -> BlockResult | SlideFailure:
    """Return what `encoder.encode` does; a SlideFailure for an exception of any type."""
    block = pixels.block
    try:
        with one_slide(block.slide, block.path, "encoded"):
            return encoder.encode(pixels)
    except EngineError as error:
        return _failure(block, error)


def _failure(of: OfSlide, error: EngineError) -> SlideFailure:
    return SlideFailure(of.slide, of.path, getattr(error, "code", "failed"), str(error))


@contextmanager
def local_backend(stages: Stages[Task, Block, Pixels]) -> Iterator[Backend[Task]]:
    """Plan, read and encode in this process, one block read ahead; the specification of every other backend."""
    section = stages.config.model
    device = choose_device(section.device)
    pin_arithmetic(section.threads)
    keep_freed_memory(device)
    worker, encoder = stages.worker(), stages.encoder(device)

    def work(tasks: Sequence[Task], given_up: Collection[str] = ()) -> Iterator[Message]:
        return _work(worker, encoder, tasks, given_up)

    yield Backend(work, hardware_of(device), lambda: 1)


def _work(
    worker: Worker[Task, Block, Pixels], encoder: Encoder[Pixels], tasks: Sequence[Task], given_up: Collection[str]
) -> Iterator[Message]:
    source = _pixels(worker, tasks, given_up)
    with ThreadPoolExecutor(1) as ahead:  # reading releases the interpreter: the next block is read meanwhile
        coming = ahead.submit(next, source, None)
        while (item := coming.result()) is not None:
            coming = ahead.submit(next, source, None)
            if isinstance(item, SlidePlan | SlideFailure):
                yield item
            elif item.block.slide not in given_up:
                yield encode_safely(encoder, item)


def _pixels(
    worker: Worker[Task, Block, Pixels], tasks: Sequence[Task], given_up: Collection[str]
) -> Iterator[Passing | Pixels]:
    """Yield plans, pixels and failures; of a slide that failed, nothing more."""
    for task in tasks:
        for planned in plan_safely(worker, task):
            if task.slide in given_up:
                break
            if isinstance(planned, SlidePlan | SlideFailure):
                yield planned
                continue
            pixels = read_safely(worker, planned)
            yield pixels
            if isinstance(pixels, SlideFailure):
                break
