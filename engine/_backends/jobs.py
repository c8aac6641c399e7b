"""Who does jobs that do not need each other, such as the trainings of a study."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from engine.core.config import RayConfig
from engine.core.runtime import MapJobs, announce_address, choose_device, one_by_one

J = TypeVar("J")
A = TypeVar("A")


class Jobs(Protocol):
    """What says where jobs compute: a configuration with these keys."""

    @property
    def ray(self) -> RayConfig: ...

    @property
    def device(self) -> str: ...

    @property
    def threads(self) -> int: ...


def on_ray(config: Jobs) -> MapJobs:
    """Return a MapJobs over the processes of a Ray cluster, or of a private Ray; one job alone is done here."""

    def map_jobs(work: Callable[[J], A], jobs: Sequence[J]) -> Iterator[A]:
        if len(jobs) < 2:
            yield from one_by_one(work, jobs)
            return
        announce_address(config.ray.address)
        from actors.backend import do_jobs
        from actors.cluster import connect

        gpus = config.ray.gpus_per_replica if choose_device(config.device, "device").startswith("cuda") else 0
        with connect(config.ray):
            yield from do_jobs(work, jobs, num_cpus=config.threads, num_gpus=gpus, attempts=config.ray.max_attempts)

    return map_jobs
