"""A cohort on Ray: coordinators that each lead pictures over their share of the replicas, and makers of bags.

Invariant: a row has the bytes that one process gives it, whoever is killed. A coordinator is a process beside the
command with a pool of its own; it leads several pictures side by side, so that its replicas have batches while one of
them begins, waits for its guide or is exported. Rows are handed out as coordinators come free; those of a lost one go
to others and continue from their last committed step. It knows no batches and no files.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.batches import first_line
from actors.cluster import connect, loss_named, node_resources
from actors.pool import GROW_CHECK_S, DenoiserPool
from actors.replica import LOST, choose_seat
from engine.cohort.bags import BagMaker
from engine.cohort.config import CohortConfig
from engine.cohort.picture import PictureMaker
from engine.cohort.run import MakeRows, Outcome, Silence, outcome_of
from engine.cohort.table import Row
from engine.core.errors import ClusterError, EngineError, ReplicaLostError
from engine.core.progress import Progress, ProgressCallback
from engine.core.runtime import pin_arithmetic
from engine.generation.run import Loaded
from engine.generation.session import Backend
from engine.model.config import ModelConfig
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig

REPLICAS_PER_COORDINATOR = 4
"""Where nobody says how many coordinators there are; how many a core keeps busy is in docs/results/scaling.md."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """A row's outcome, and the tiles that were evaluated for it."""

    outcome: Outcome
    tiles: int = 0


class Coordinator:
    """Leads pictures over a pool of its own; an actor whose calls run in threads."""

    def __init__(self, config: CohortConfig, model: ModelConfig, replicas: int, folder: str) -> None:
        """`config` has its dtype settled; `replicas` is its share; `folder` is where relative paths begin."""
        if Path(folder).is_dir():
            os.chdir(folder)
        self._config, self._model = config, model
        self._ray = replace(config.ray, replicas=replicas)
        self._maker: PictureMaker | None = None
        self._pool: DenoiserPool | None = None

    def load(self) -> None:
        """Load the model and start the replicas.

        A call and not the constructor: an error here keeps its own type and text. Raises: EngineError.
        """
        section = self._config.model
        pin_arithmetic(section.threads)
        loaded = Loaded.of(self._config)
        self._maker = PictureMaker(self._config, self._model, loaded)
        self._pool = DenoiserPool(loaded.model, self._ray, threads=section.threads, device=section.device)
        self._pool.wait_ready()

    def make(self, row: Row) -> Done:
        """Make a picture. Raises: EngineError that ends the job."""
        assert self._maker is not None, "load comes first"
        maker, progress = self._maker, Progress(Silence())
        outcome = outcome_of(row, lambda: maker.make(row, self._start, progress), Path(self._config.out))
        return Done(outcome, progress.tile_count)

    def widen(self, replicas: int) -> None:
        """Take over the place of replicas that another coordinator has left."""
        assert self._pool is not None, "load comes first"
        for _ in range(replicas):
            self._pool.add_replica()

    @contextmanager
    def _start(self, model: ZoomLDM, config: RunConfig) -> Iterator[Backend]:
        """Lend the pool to one picture; it stays when that is done."""
        del model, config
        pool = self._pool
        assert pool is not None, "load comes first"
        pool.wait_ready()

        def facts() -> dict[str, object]:
            stats = pool.stats
            return {"replicas": stats.replicas, "restarts": stats.restarts, "retries": stats.retries}

        yield Backend(pool, pool.replicas[0].hardware, lambda: pool.stats.replicas, facts)


class BagWorker:
    """Makes bags, one after another, on a seat of its own."""

    def __init__(self, config: CohortConfig, folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        self._config = config
        self._maker: BagMaker | None = None

    def load(self) -> None:
        """Load the networks. Raises: EngineError."""
        self._maker = BagMaker(self._config)

    def make(self, row: Row) -> Done:
        """Make a bag. Raises: EngineError that ends the job."""
        assert self._maker is not None, "load comes first"
        maker = self._maker
        return Done(outcome_of(row, lambda: maker.make(row), Path(self._config.out)))


@dataclass(eq=False)
class Member:
    """A coordinator, or a maker of bags, as the command sees it."""

    handle: Any
    share: int
    """Replicas of a coordinator."""
    rows: dict[ray.ObjectRef, Row] = field(default_factory=dict)
    """What it is asked for and has not answered."""
    loading: ray.ObjectRef | None = None


class Team:
    """Who makes the rows of a cohort; use inside `cluster.connect`."""

    def __init__(self, config: CohortConfig, model: ModelConfig, rows: int, watch: ProgressCallback) -> None:
        """Start as many as `rows` rows can use. Raises: ClusterError when the cluster has no place for a replica."""
        section = config.model
        self._config, self._model, self._watch = config, model, watch
        self._seat = choose_seat(config.ray, section.threads, section.device, node_resources())
        count = config.ray.replicas or max(1, self._seat.fit(node_resources()))
        self._at_once = 1 if config.bags_only else config.pictures_at_once
        self._members = [self._start(share) for share in shares(config, count, rows)]
        self._attempts: dict[str, int] = {}
        self._looked_s = time.monotonic()

    def make(self, rows: Sequence[Row]) -> Iterator[Outcome]:
        """Yield the outcome of each row, as they come.

        Raises: the EngineError that ends the job; ReplicaLostError when the makers of a row were lost too often.
        """
        waiting, left = deque(rows), len(rows)
        while left:
            self._hand_out(waiting)
            for done in self._heard(waiting):
                left -= 1
                self._watch.tiles(done.tiles)
                yield done.outcome

    def close(self) -> None:
        """End all; a coordinator's replicas end with it."""
        for member in self._members:
            ray.kill(member.handle)
        self._members.clear()

    def _start(self, share: int) -> Member:
        folder, config = os.getcwd(), self._config
        if config.bags_only:
            seat = self._seat
            maker: Any = ray.remote(
                num_cpus=seat.num_cpus, num_gpus=seat.num_gpus, max_restarts=0, scheduling_strategy="SPREAD"
            )(BagWorker)
            handle = maker.remote(config, folder)
        else:
            # Beside the command, where the cohort's folder is; its replicas are wherever there is room.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            options: dict[str, Any] = {"max_concurrency": self._at_once + 1, "scheduling_strategy": here}
            actor: Any = ray.remote(num_cpus=0, num_gpus=0, max_restarts=0)(Coordinator)
            actor = actor.options(**options)
            handle = actor.remote(config, self._model, share, folder)
        return Member(handle, share, loading=handle.load.remote())

    def _hand_out(self, waiting: deque[Row]) -> None:
        """Give each that is loaded a row more, the least busy first; let those go that nothing is left for."""
        ready = [member for member in self._members if member.loading is None]
        while waiting and ready:
            member = min(ready, key=lambda m: len(m.rows))
            if len(member.rows) >= self._at_once:
                return
            row = waiting.popleft()
            member.rows[member.handle.make.remote(row)] = row
        if not waiting and not self._config.bags_only:
            for idle in [m for m in ready if not m.rows]:
                self._leave(idle)

    def _leave(self, idle: Member) -> None:
        """End a coordinator without rows; the one with most rows takes its replicas' places."""
        busy = [m for m in self._members if m.rows]
        if not busy:
            return
        self._members.remove(idle)
        ray.kill(idle.handle)
        max(busy, key=lambda m: len(m.rows) / m.share).handle.widen.remote(idle.share)

    def _heard(self, waiting: deque[Row]) -> Iterator[Done]:
        """Wait for one thing to happen, at most a second; yield what is done, and put back what is lost."""
        by_ref = {ref: m for m in self._members for ref in [*m.rows, *([m.loading] if m.loading is not None else [])]}
        with loss_named():
            if time.monotonic() - self._looked_s > GROW_CHECK_S:
                node_resources()  # raises when the head is gone
                self._looked_s = time.monotonic()
            ready = ray.wait(list(by_ref), num_returns=1, timeout=1.0)[0] if by_ref else []
        for ref in ready:
            member = by_ref[ref]
            if member not in self._members:
                continue
            try:
                found = ray.get(ref)
            except LOST as error:
                self._lose(member, waiting, error)
                continue
            except RayTaskError as error:
                self._end_or_go_on(member, ref, error)
                continue
            if ref == member.loading:
                member.loading = None
            else:
                del member.rows[ref]
                yield found

    def _end_or_go_on(self, member: Member, ref: ray.ObjectRef, error: RayTaskError) -> None:
        """Raise what a member ended with; go on without one that found no room while there are others."""
        cause = error.cause
        if ref == member.loading and isinstance(cause, ClusterError) and len(self._members) > 1:
            log.warning("A coordinator found no room for its replicas and is left out: %s", first_line(cause))
            self._members.remove(member)
            ray.kill(member.handle)
            return
        raise (cause if isinstance(cause, EngineError) else error) from error

    def _lose(self, member: Member, waiting: deque[Row], error: BaseException) -> None:
        """Replace a member that is gone; its rows go first. Raises: ReplicaLostError when that happens too often."""
        log.warning("A coordinator is lost (%s); another one continues its rows.", first_line(error))
        self._members.remove(member)
        ray.kill(member.handle)
        names = [row.name for row in member.rows.values()] or ["(loading)"]
        for name in names:
            self._attempts[name] = self._attempts.get(name, 0) + 1
        worst = max(names, key=lambda name: self._attempts[name])
        if self._attempts[worst] >= self._config.ray.max_attempts:
            raise ReplicaLostError(
                f"{worst} must be made within ray.max_attempts={self._config.ray.max_attempts} coordinators; each was "
                f"lost ({first_line(error)}). What is committed is kept: mend the cause, such as memory, or lower "
                "pictures_at_once, and start the same command to continue."
            ) from error
        waiting.extendleft(reversed(member.rows.values()))
        self._members.append(self._start(member.share))


def shares(config: CohortConfig, replicas: int, rows: int) -> list[int]:
    """Return how many replicas each coordinator gets: a coordinator per 8, none without a row, none without a replica.

    For bags: a maker per replica.
    """
    if config.bags_only:
        return [1] * min(replicas, rows)
    count = config.coordinators or -(-replicas // REPLICAS_PER_COORDINATOR)
    count = max(1, min(count, replicas, rows))
    return [replicas // count + (i < replicas % count) for i in range(count)]


@contextmanager
def rows_on_ray(config: CohortConfig, model: ModelConfig, watch: ProgressCallback) -> Iterator[MakeRows]:
    """Make rows on a Ray cluster, or on a private Ray; `config` has its dtype settled. Raises: ClusterError."""
    with connect(config.ray):
        teams: list[Team] = []

        def make(rows: Sequence[Row]) -> Iterator[Outcome]:
            teams.append(Team(config, model, len(rows), watch))
            yield from teams[-1].make(rows)

        try:
            yield make
        finally:
            for team in teams:
                team.close()
