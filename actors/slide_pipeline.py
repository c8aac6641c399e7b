"""Work on slides on Ray Data: slides → plans and blocks → pixels → results, which the driver writes.

Coordinates travel to the readers, pixels to the encoders, results to the driver; slides need to be where readers run,
the run folder only where the driver runs. Invariant: the same functions as `local_backend`, so the same results; what
fails is data, for Ray Data knows no failure of a part. It does not know tissue, grids or networks.
Source: Ray 2.60; on the deadlock of actor pools that hold all CPUs, ray issue 44687.
"""

import logging
import pickle
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError, UserCodeException

from actors.backend import hardware_at
from actors.cluster import node_resources
from actors.replica import Seat
from engine.core.errors import ClusterError
from engine.core.runtime import keep_freed_memory, pin_arithmetic
from engine.pipeline.stages import (
    Backend,
    Block,
    Message,
    OfBlock,
    OfSlide,
    Passing,
    Pixels,
    SlideFailure,
    SlidePlan,
    SlidesConfig,
    Stages,
    Task,
    Worker,
    encode_safely,
    plan_safely,
    read_safely,
)

READ_CPUS = 0.25
"""Of a reading or planning task. All shares are multiples of this and the encoders leave one free on every CPU: an
actor pool that holds all CPUs for the whole run would wait for ever for its readers."""
ENCODE_CPUS = 0.75
"""Of an encoder on CPUs: one per CPU, the rest is for reading. On GPUs it takes no CPU, so that it cannot block."""
IN_FLIGHT = 2
"""Blocks at an encoder: one at work, one waiting."""
COLUMN = "item"
Rows = dict[str, np.ndarray]
AnyStages = TypeVar("AnyStages", bound=Stages[Any, Any, Any])  # whatever they work on


@dataclass(frozen=True)
class Shape:
    """How many encoders, and on what."""

    replicas: int
    device: Literal["cpu", "cuda"]
    gpus: float
    cpus: float


def shape_of(config: SlidesConfig) -> Shape:
    """Choose by what the cluster has now. Raises ClusterError when a GPU is asked for and there is none."""
    nodes = node_resources()
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    if config.model.device == "cuda" and not gpus:
        here = "; ".join(map(str, nodes))
        raise ClusterError(f"model.device=cuda needs GPUs in the cluster; it has {here}. Use model.device=cpu.")
    if config.model.device != "cpu" and gpus:
        fit = max(1, int(gpus / config.ray.gpus_per_replica))
        # More than fit now wait for nodes that join.
        return Shape(config.ray.replicas or fit, "cuda", config.ray.gpus_per_replica, 0.0)
    fit = max(1, int(cpus))
    return Shape(min(config.ray.replicas or fit, fit), "cpu", 0.0, ENCODE_CPUS)


def slides_on_ray(stages: Stages[Task, Block, Pixels]) -> Backend[Task]:
    """Return the backend on the connected cluster; `stages` is a frozen dataclass. Raises ClusterError."""
    shape, here = shape_of(stages.config), _with_whole_paths(stages)
    seat = Seat(shape.device, shape.cpus, shape.gpus)
    hardware = hardware_at(seat, stages.config.ray.start_timeout_s)

    def work(tasks: Sequence[Task], given_up: Collection[str] = ()) -> Iterator[Message]:
        return _work(here, shape, tasks, given_up)

    return Backend(work, hardware, lambda: shape.replicas)


def _with_whole_paths(stages: AnyStages) -> AnyStages:
    """Return the stages with a config whose paths hold in a worker's folder too."""
    config = stages.config

    def whole(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path is not None and Path(path).exists() else path

    source, encoder = whole(config.model.source) or config.model.source, whole(config.model.encoder_source)
    model = replace(config.model, source=source, encoder_source=encoder)
    config = replace(config, model=model, overrides=whole(config.overrides), tissue=whole(config.tissue))
    return replace(stages, config=config)


@ray.remote(num_cpus=0, max_restarts=-1)
class _GivenUp:
    """The slides that the driver has given up, for readers and encoders everywhere."""

    def __init__(self) -> None:
        self._slides: set[str] = set()

    def tell(self, slides: set[str]) -> None:
        self._slides = slides

    def has(self, slide: str) -> bool:
        return slide in self._slides


def _has_given_up(board: Any, slide: str) -> bool:
    try:
        return ray.get(board.has.remote(slide))
    except RayError:  # the board is lost with its node, and comes back empty: what is read in vain does no harm
        return False


def _work(
    stages: Stages[Task, Block, Pixels], shape: Shape, tasks: Sequence[Task], given_up: Collection[str]
) -> Iterator[Message]:
    """Yield what the pipeline gives, in any order. Raises ClusterError when it stands still or its nodes are lost."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = stages.config.ray.batch_timeout_s
    # One row per Ray block: all blocks of one huge slide would else be read by one task, one after the other.
    context.target_max_block_size = 1
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    board: Any = _GivenUp.remote()
    told = 0
    # Any: Ray Data types its batches as every format at once.
    slides: Any = ray.data.from_items([{COLUMN: pickle.dumps(t)} for t in tasks], override_num_blocks=len(tasks))
    planners = max(1, round(sum(n.cpus for n in node_resources()) / 4))
    small: dict[str, Any] = {"batch_size": 1, "zero_copy_batch": True}
    planned = slides.map_batches(
        _plan, fn_args=(stages,), num_cpus=READ_CPUS, compute=TaskPoolStrategy(planners), **small
    )
    results = planned.map_batches(_read, fn_args=(stages, board), num_cpus=READ_CPUS, **small).map_batches(
        _Encoder,
        fn_constructor_args=(stages, shape.device, board),
        num_cpus=shape.cpus,
        num_gpus=shape.gpus or None,
        compute=ActorPoolStrategy(min_size=1, max_size=shape.replicas, max_tasks_in_flight_per_actor=IN_FLIGHT),
        **small,
    )
    try:
        for rows in results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            yield from map(pickle.loads, rows[COLUMN])
            if len(given_up) > told:
                told = len(given_up)
                board.tell.remote(set(given_up))
    except UserCodeException:
        raise  # a bug of ours, with its own stack
    except ExecutionTimeoutError as error:
        raise ClusterError(
            f"The pipeline must finish a block within ray.batch_timeout_s={stages.config.ray.batch_timeout_s:g}; none "
            "came. What was written is kept: run the same command again, with a larger --ray.batch_timeout_s or a "
            "smaller --blocks.parents if the machine is only slow."
        ) from error
    except RayError as error:
        raise ClusterError(
            f"The cluster must keep the pipeline going; {str(error).strip().splitlines()[-1]}. What was written is "
            "kept: run the same command again, on nodes with more memory if workers were killed for it."
        ) from error


def _packed(item: Message | OfSlide | OfBlock) -> Rows:
    """Return one row. Bytes and no tensor columns: plans, pixels and failures share the way."""
    column = np.empty(1, object)
    column[0] = pickle.dumps(item, protocol=5)
    return {COLUMN: column}


@lru_cache(maxsize=1)
def _worker(stages: Stages[Task, Block, Pixels]) -> Worker[Task, Block, Pixels]:
    """Return this process's worker: open slides stay open between tasks."""
    return stages.worker()


def _plan(rows: Rows, stages: Stages[Task, Block, Pixels]) -> Iterator[Rows]:
    """Turn a task into its plan and then its blocks."""
    tasks: Iterator[Task] = map(pickle.loads, rows[COLUMN])
    for task in tasks:
        for planned in plan_safely(_worker(stages), task):
            yield _packed(planned)


def _read(rows: Rows, stages: Stages[Task, Block, Pixels], board: Any) -> Iterator[Rows]:
    """Turn a block into its pixels; what is not a block passes, and of slides that were given up nothing comes."""
    items: Iterator[Passing | Block] = map(pickle.loads, rows[COLUMN])
    for item in items:
        if isinstance(item, SlidePlan | SlideFailure):
            yield _packed(item)
        elif not _has_given_up(board, item.slide):
            yield _packed(read_safely(_worker(stages), item))


class _Encoder(Generic[Pixels]):
    """Pixels → results, in an actor; what is not pixels passes."""

    def __init__(self, stages: Stages[Task, Block, Pixels], device: str, board: Any) -> None:
        pin_arithmetic(stages.config.model.threads)
        keep_freed_memory(device)
        self._encoder, self._board = stages.encoder(device), board

    def __call__(self, rows: Rows) -> Iterator[Rows]:
        items: Iterator[Passing | Pixels] = map(pickle.loads, rows[COLUMN])
        for item in items:
            if isinstance(item, SlidePlan | SlideFailure):
                yield _packed(item)
            elif not _has_given_up(self._board, item.block.slide):
                yield _packed(encode_safely(self._encoder, item))
