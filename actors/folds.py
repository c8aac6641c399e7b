"""Do independent jobs on Ray, as many at a time as the cluster holds; knows neither folds nor models.

A job is a function of its argument that may be done again, so a lost worker costs its job's time and nothing else. What
a job raises is raised here, and the jobs that wait are cancelled.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from engine.errors import ReplicaLostError

J = TypeVar("J")
A = TypeVar("A")


def do_jobs(
    work: Callable[[J], A], jobs: Sequence[J], *, num_cpus: int, num_gpus: float = 0, attempts: int = 4
) -> Iterator[A]:
    """Yield the answers as they come, inside `cluster.connect`; at most `attempts` tries per job.

    Raises: what a job raised, as it is; ReplicaLostError when a job's workers died too often.
    """
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=attempts - 1)(work)
    pending = [task.remote(job) for job in jobs]
    try:
        while pending:
            (done,), pending = ray.wait(pending, num_returns=1)
            yield ray.get(done)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise ReplicaLostError(
            f"a job must end on one of {attempts} workers; each died ({error}). If memory ran out, lower memory_mb."
        ) from error
    finally:
        for left in pending:
            ray.cancel(left, force=True)
