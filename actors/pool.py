"""DenoiserPool: DenoiseTiles over replicas that may die, hang, err, join and leave.

Invariant: the answers are those of LocalDenoiser, in the same order, whatever happens to replicas; a batch is evaluated
again whole, and a replica's answer is used once. Several threads may each iterate runs of their own: what one of them
hears is noted for all, and none holds the others up while it waits or cuts its batches. It does not know canvases or
plans. Ray's own restarts are off: a replay on the same actor would meet the same fault, and only the pool knows the
deadline of a batch.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from threading import RLock, get_ident
from typing import Any, Literal, Self

import ray
import torch
from ray.exceptions import RayTaskError

from actors.batches import PoolStats, PoolWatch, Run, Work, begun, fault_of, first_line, nbytes, own_copy
from actors.cluster import loss_named, node_resources
from actors.denoiser_actor import Answer, ReplicaInfo, pack_model
from actors.replica import LOST, Replica, choose_seat
from engine.core.config import RayConfig
from engine.core.errors import ClusterError, DeviceMemoryError, ReplicaLostError
from engine.model.zoomldm import ZoomLDM
from engine.sampling.denoiser import DecodeBatch, DecodedBatch, EncodeBatch, EncodedBatch, TileBatch, TilePrediction

GROW_CHECK_S = 5.0
"""Time between two looks at the cluster for new nodes."""
START_FAILURES = 3
"""Replicas that may fail to load one after the other before the cause is taken to be the same for all."""
log = logging.getLogger(__name__)


class DenoiserPool:
    """DenoiseTiles over Ray actors; use as a context manager, inside `cluster.connect`.

    Replicas start at once and in the background; the first batch waits for the first of them. `config.replicas` of them
    are wished for, or as many as the cluster holds: one per `gpus_per_replica`, on CPUs one per `threads`. Those that
    do not fit wait for nodes to join. Weights go to the object store once, when the pool is made.
    Raises: ClusterError when a GPU is asked for and there is none.
    """

    def __init__(
        self,
        model: ZoomLDM,
        config: RayConfig,
        *,
        threads: int = 1,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        watch: PoolWatch | None = None,
    ) -> None:
        self.config = config
        self._watch = watch
        self._threads = threads
        self._seat = choose_seat(config, threads, device, node_resources())
        self._weights = ray.put(pack_model(model))
        self._replicas: list[Replica] = []
        self._runs: list[Run] = []
        """Those that are open, oldest first."""
        self._lock = RLock()
        """Held while anything below is looked at or changed; never while waiting, nor while a source makes a batch."""
        self._count = PoolStats()
        self._numbers = self._changed_by_hand = self._start_failures = 0
        self._none_ready_since: float | None = time.monotonic()
        self._capacity, self._grow_at = 0, 0.0
        self._grow()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all replicas; what they owed is lost."""
        with self._lock:
            while self._replicas:
                self._replicas.pop().kill()

    @property
    def stats(self) -> PoolStats:
        """Return the counts so far."""
        with self._lock:
            ready = sum(r.ready for r in self._replicas)
            return replace(self._count, replicas=ready, replicas_starting=len(self._replicas) - ready)

    @property
    def replicas(self) -> list[ReplicaInfo]:
        """Return where the replicas that are ready run, oldest first."""
        with self._lock:
            return [r.info for r in self._replicas if r.info is not None]

    @property
    def wished(self) -> int:
        """Return the number of replicas the pool keeps up or waits for."""
        base = self.config.replicas or max(1, self._capacity)
        return max(1, base + self._changed_by_hand)

    def add_replica(self) -> None:
        """Wish for one replica more; it takes batches as soon as it is ready."""
        with self._lock:
            self._changed_by_hand += 1
            self._grow()

    def remove_replica(self) -> None:
        """End one replica, the least busy; its batches go to the others. Raises ValueError for the last one."""
        with self._lock:
            if self.wished == 1:
                raise ValueError("A pool must keep 1 replica; got a call to remove the last one. Use close().")
            self._changed_by_hand -= 1
            if len(self._replicas) > self.wished:
                leaving = min(self._replicas, key=lambda r: (r.ready, len(r.calls), -r.number))
                self._discard(leaving)

    def wait_ready(self, count: int = 1) -> None:
        """Wait until `count` replicas are ready. Raises ClusterError after `start_timeout_s`."""
        until = time.monotonic() + self.config.start_timeout_s
        while len(self.replicas) < count:
            with loss_named():
                self._advance()
            if time.monotonic() > until:
                raise ClusterError(f"{count} replicas must be ready; {len(self.replicas)} are. {self._seat.shortage()}")

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        """See DenoiseTiles. At most 2 · `in_flight` · replicas batches are read ahead.

        Raises: ReplicaLostError when a batch failed `max_attempts` times; ClusterError when no replica can be had for
        `start_timeout_s`; what a replica raised for a batch, as it is.
        """
        return begun(self._answers(Run("denoise", iter(batches))))

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        """As denoise, for latent windows."""
        return begun(self._answers(Run("decode", iter(batches))))

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        """As denoise, for picture windows."""
        return begun(self._answers(Run("encode", iter(batches))))

    def _answers(self, run: Run) -> Iterator[Any]:
        """Yield None once, then a run's answers in order.

        Of several runs of a thread, each queues batches of all; answers are noted for those of every thread.
        """
        with self._lock:
            self._runs.append(run)
        try:
            yield None
            while True:
                with self._lock:
                    own = [other for other in self._runs if other is run or other.owner == get_ident()]
                # The newest first: it is what the others wait for.
                crowded = any([self._dispatch(other) for other in reversed(own)])
                run.check()
                if (answer := run.next_answer()) is not None:
                    yield answer
                elif run.finished:
                    return
                else:
                    with loss_named():
                        self._advance(run, crowded)
        finally:
            with self._lock:
                run.closed = True
                self._runs.remove(run)

    def _dispatch(self, run: Run) -> bool:
        """Queue the run's batches while a replica has room; say whether it was room that ended it."""
        while True:
            window = 2 * self.config.in_flight * max(1, len(self.replicas))
            with self._lock:
                room = self._room(set())
            if room is None:
                return True
            if (work := run.next_work(window)) is None:
                return False
            with self._lock:
                target = self._room(work.avoid)  # looked up again: the source, or a thread, may have used the pool
                if target is None:
                    run.again.appendleft(work)
                    return False  # not any room will do: it is asked for again when something has happened
                self._count = replace(self._count, bytes_sent=self._count.bytes_sent + nbytes(work.batch))
                target.call(run.method, work)

    def _room(self, avoid: set[int]) -> Replica | None:
        """Return the least busy replica with room, of those not to avoid while there are any."""
        live = [r for r in self._replicas if r.ready]
        live = [r for r in live if r.number not in avoid] or live
        free = [r for r in live if len(r.calls) < self.config.in_flight]
        return min(free, key=lambda r: (len(r.calls), r.number), default=None)

    def _advance(self, run: Run | None = None, crowded: bool = False) -> None:
        """Wait for one thing to happen, at most a second, and settle everything that has.

        Not if another thread has noted an answer of `run` meanwhile, or has made room where it was `crowded`: what is
        not noted when the lock is taken comes from a call that is waited for here, or behind one.
        """
        tick = min(1.0, self.config.batch_timeout_s / 4)
        with self._lock:
            if (run is not None and run.answered) or (crowded and self._room(set()) is not None):
                return
            self._grow()
            waiting = {ref: r for r in self._replicas if (ref := r.awaited) is not None}
        refs = list(waiting)
        if not refs:
            time.sleep(tick)
            ready: list[ray.ObjectRef] = []
        else:
            ready = ray.wait(refs, num_returns=1, timeout=tick)[0]
            if ready:
                ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        with self._lock:
            for ref in ready:
                at = waiting[ref]
                if at not in self._replicas or at.awaited != ref:
                    continue  # another thread has settled it
                if at.ready:
                    self._settle_call(at)
                else:
                    self._settle_start(at)
            self._expire()

    def _settle_start(self, fresh: Replica) -> None:
        """Welcome a replica that has loaded, or count one that could not."""
        try:
            fresh.welcome(self.config.start_timeout_s)
        except (*LOST, RayTaskError) as error:
            self._replicas.remove(fresh)
            fresh.kill()
            self._start_failures += 1
            log.warning("Replica %d did not start: %s", fresh.number, first_line(error))
            if self._start_failures >= START_FAILURES and not self.replicas:
                raise ClusterError(
                    f"{self._start_failures} replicas in a row did not start; the last one: {error}"
                ) from error
            return
        self._start_failures = 0
        self._none_ready_since = None

    def _settle_call(self, at: Replica) -> None:
        """Take a replica's oldest answer: keep it, ask again, or stop the run."""
        ref, work = at.take_oldest()
        try:
            answer: Answer = ray.get(ref, timeout=self.config.batch_timeout_s)
        except LOST as error:
            self._lose(at, work, f"replica lost ({first_line(error)})")
            return
        except RayTaskError as error:
            if work.run.closed:
                return
            cause = error.cause
            if isinstance(cause, DeviceMemoryError):
                self._ask_elsewhere(at, work, f"out of memory ({first_line(cause)})")
                return
            if isinstance(cause, torch.AcceleratorError):
                # A device that erred is unusable for its whole process: the replica is as good as dead.
                self._lose(at, work, f"device error ({first_line(cause)})")
                return
            self._fail(work, cause if isinstance(cause, Exception) else error, error)
            return
        fault = fault_of(work.batch, answer.value)
        if fault is None:
            self._keep(work, answer)
            return
        if fault.startswith("non-finite"):
            work.float32 = True
            self._count = replace(self._count, float32_retries=self._count.float32_retries + 1)
        self._ask_elsewhere(at, work, fault)

    def _keep(self, work: Work, answer: Answer) -> None:
        """Store an answer for its run."""
        self._count = replace(
            self._count,
            batches=self._count.batches + 1,
            compute_s=self._count.compute_s + answer.seconds,
            bytes_received=self._count.bytes_received + nbytes(answer.value),
        )
        if self._watch is not None:
            self._watch.batch(work.run.method, answer.seconds)
        if not work.run.closed:
            work.run.done[work.position] = own_copy(answer.value)

    def _expire(self) -> None:
        """Give up replicas whose oldest batch is overdue, and the wait for replicas when it is."""
        limit, patience = self.config.batch_timeout_s, self.config.start_timeout_s
        for late in [r for r in self._replicas if r.overdue(limit)]:
            _, work = late.take_oldest()
            self._lose(late, work, f"no answer within ray.batch_timeout_s={limit:g}")
        if self.replicas:
            self._none_ready_since = None
        elif self._none_ready_since is None:
            self._none_ready_since = time.monotonic()
        elif time.monotonic() - self._none_ready_since > patience:
            raise ClusterError(f"No replica is ready within ray.start_timeout_s={patience:g}. {self._seat.shortage()}")

    def _lose(self, dead: Replica, guilty: Work, cause: str) -> None:
        """Replace a replica. Only its oldest batch may have been the reason; the others just go elsewhere."""
        log.warning("Replica %d: %s; it is replaced.", dead.number, cause)
        self._count = replace(self._count, restarts=self._count.restarts + 1)
        if self._watch is not None:
            self._watch.restart()
        self._start_failures = 0
        self._grow_at = 0.0  # its node may be gone, or the head
        self._discard(dead)
        self._grow()
        self._ask_again(guilty, cause)

    def _discard(self, leaving: Replica) -> None:
        """End a replica and put back what it owed, in order."""
        self._replicas.remove(leaving)
        for work in reversed(leaving.kill()):
            if not work.run.closed:
                work.run.again.appendleft(work)

    def _ask_elsewhere(self, at: Replica, work: Work, cause: str) -> None:
        """Queue a batch that a replica lives on to have failed; another one is asked while there is one."""
        log.warning("Replica %d: %s; batch %s is evaluated again.", at.number, cause, work.batch.key)
        work.avoid.add(at.number)
        self._ask_again(work, cause)

    def _ask_again(self, work: Work, cause: str) -> None:
        """Queue a failed batch first. Raises ReplicaLostError when it has failed often enough."""
        work.causes.append(cause)
        if work.run.closed:
            return
        if len(work.causes) >= self.config.max_attempts:
            self._fail(work, ReplicaLostError(work.epitaph()))
            return
        self._count = replace(self._count, retries=self._count.retries + 1)
        work.run.again.appendleft(work)

    def _fail(self, work: Work, error: Exception, cause: Exception | None = None) -> None:
        """Raise what a batch ended with; in another thread than its run's, leave it for that one."""
        if work.run.owner == get_ident():
            raise error from cause
        work.run.failure = error

    def _grow(self) -> None:
        """Start replicas up to the wished number; look at the cluster now and then for what joined."""
        now = time.monotonic()
        if now >= self._grow_at:
            self._capacity, self._grow_at = self._seat.fit(node_resources()), now + GROW_CHECK_S
        while len(self._replicas) < self.wished and self._start_failures < START_FAILURES:
            self._numbers += 1
            fresh = Replica(self._numbers, self._seat, self._threads, self._weights)
            self._replicas.append(fresh)
