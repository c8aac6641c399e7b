"""One replica as the pool sees it, and the calls it has not answered, oldest first.

Invariant: an actor answers in the order of its calls, so only the oldest call can be ready, late or to blame. It does
not know runs, the order of answers or how many replicas there are.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

from actors.batches import Work
from actors.cluster import NodeResources, node_resources
from actors.denoiser_actor import DenoiserActor, ReplicaInfo
from engine.core.config import RayConfig
from engine.core.errors import ClusterError

LOST = (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError, GetTimeoutError)
"""What Ray says when a replica or its answer is gone; which of them arrives depends on timing and must not matter."""


@dataclass(frozen=True)
class Seat:
    """Where one replica computes: its device and what it takes from the cluster."""

    device: Literal["cpu", "cuda"]
    num_cpus: float
    num_gpus: float

    def fit(self, nodes: list[NodeResources]) -> int:
        """Return how many replicas the nodes hold; a share of a GPU never spans two, as Ray places it."""
        if self.num_gpus >= 1:
            return sum(int(node.gpus // self.num_gpus) for node in nodes)
        if self.num_gpus:
            return sum(int(node.gpus) * int(1 / self.num_gpus) for node in nodes)
        return sum(int(node.cpus // self.num_cpus) for node in nodes)

    def shortage(self) -> str:
        """Say what a replica takes and what the cluster has."""
        has = "; ".join(map(str, node_resources())) or "no node"
        return f"Each takes {self.num_cpus:g} CPU and {self.num_gpus:g} GPU; the cluster has {has}."


def choose_seat(
    config: RayConfig, threads: int, device: Literal["auto", "cpu", "cuda"], nodes: list[NodeResources]
) -> Seat:
    """Choose where replicas compute.

    A cluster that grows on demand may have no GPU yet. With `device` cuda and a number of replicas the user has said
    what to wait for, and the replicas that wait are the demand such a cluster answers.
    Raises: ClusterError, listing the nodes, when the cluster has no such place and none is asked for.
    """
    most_gpus = max((node.gpus for node in nodes), default=0.0)
    most_cpus = max((node.cpus for node in nodes), default=0.0)
    has = "; ".join(map(str, nodes)) or "no node"
    if device == "cuda" or (device == "auto" and most_gpus > 0):
        waits = device == "cuda" and config.replicas is not None
        if most_gpus < config.gpus_per_replica and not waits:
            raise ClusterError(
                f"model.device=cuda needs a node with ray.gpus_per_replica={config.gpus_per_replica:g} GPU; the "
                f"cluster has {has}. Start a node with GPUs, set ray.replicas to wait for nodes to join, or set "
                "model.device=cpu."
            )
        # No CPUs beside the GPU: CPUs counted twice are how actors come to wait for ever on a node that has room.
        return Seat("cuda", 0, config.gpus_per_replica)
    if most_cpus < 1:
        raise ClusterError(f"A replica needs a node with a CPU; the cluster has {has}. Start a worker node.")
    return Seat("cpu", min(threads, int(most_cpus)), 0)


class Replica:
    """A handle of one actor, its state and its queue."""

    def __init__(self, number: int, seat: Seat, threads: int, weights: ray.ObjectRef) -> None:
        self.number = number
        self.info: ReplicaInfo | None = None
        self.calls: deque[tuple[ray.ObjectRef, Work]] = deque()
        self.head_since = 0.0
        remote = ray.remote(
            num_cpus=seat.num_cpus,
            num_gpus=seat.num_gpus,
            max_restarts=0,  # Ray would replay on the same actor; the pool re-queues on another one
            max_task_retries=0,
            scheduling_strategy="SPREAD",  # replicas do not crowd one node's cores while another stands empty
        )
        self._handle: Any = remote(DenoiserActor).remote(threads, seat.device)
        self._loaded = self._handle.load.remote(weights)

    @property
    def ready(self) -> bool:
        return self.info is not None

    @property
    def awaited(self) -> ray.ObjectRef | None:
        """What to wait for: the loading, then the oldest call; None when idle."""
        if not self.ready:
            return self._loaded
        return self.calls[0][0] if self.calls else None

    def welcome(self, timeout_s: float) -> None:
        """Take note that the weights are loaded. Raises what loading raised, or one of LOST."""
        self.info = ray.get(self._loaded, timeout=timeout_s)

    def call(self, method: str, work: Work) -> None:
        """Queue a batch behind the others."""
        if not self.calls:
            self.head_since = time.monotonic()
        ref = getattr(self._handle, method).remote(work.batch, work.float32)
        self.calls.append((ref, work))

    def take_oldest(self) -> tuple[ray.ObjectRef, Work]:
        """Take the oldest call off the queue; the next one's time starts now."""
        self.head_since = time.monotonic()
        return self.calls.popleft()

    def overdue(self, limit_s: float) -> bool:
        """Say whether the oldest call is late. An answer that came while nobody iterated is not."""
        if not self.ready or not self.calls or time.monotonic() - self.head_since <= limit_s:
            return False
        return not ray.wait([self.calls[0][0]], timeout=0)[0]

    def kill(self) -> list[Work]:
        """End the actor and return the batches it owed, oldest first."""
        owed = [work for _, work in self.calls]
        self.calls.clear()
        ray.kill(self._handle)
        return owed
