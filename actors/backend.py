"""What the commands want of Ray: replicas to sample a canvas with, what those compute on, and jobs side by side.

What they compute on is asked before a model is loaded, in the dtype that suits them; the answer is one node's: of a
cluster of unlike nodes, the one that Ray gives the question. A job is a function of its argument that may be done
again, so a lost worker costs its job's time and nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from actors.cluster import connect, joins_cluster, node_resources
from actors.metrics import RunMetrics
from actors.pool import DenoiserPool
from actors.replica import Seat, choose_seat
from engine.core.config import RayConfig
from engine.core.errors import ClusterError, ReplicaLostError
from engine.core.runtime import Hardware, choose_device, hardware_of
from engine.generation.session import Backend
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig

J = TypeVar("J")
A = TypeVar("A")


@contextmanager
def ray_backend(connection: ExitStack, model: ZoomLDM, config: RunConfig) -> Iterator[Backend]:
    """Compute on replicas.

    They leave with this context, so that nobody waits for exports on a GPU; Ray is left with `connection`.
    """
    section = config.model
    connection.enter_context(connect(config.ray))
    metrics = RunMetrics(config.output.folder)
    with DenoiserPool(model, config.ray, threads=section.threads, device=section.device, watch=metrics) as pool:
        pool.wait_ready()

        def facts() -> dict[str, object]:
            stats = pool.stats
            return {
                "replicas": stats.replicas,
                "restarts": stats.restarts,
                "retries": stats.retries,
                "float32_retries": stats.float32_retries,
                "batches": stats.batches,
                "compute_s": round(stats.compute_s, 3),
            }

        yield Backend(pool, pool.replicas[0].hardware, lambda: pool.stats.replicas, facts, metrics)


def hardware_of_replicas(config: RayConfig, device: str) -> Hardware:
    """Return what replicas compute on; `device` is model.device. A private Ray is this machine, and is not started.

    Raises: ClusterError when the cluster does not answer or has no place for a replica within ray.start_timeout_s.
    """
    if not joins_cluster(config):
        return hardware_of(choose_device(device))
    with connect(config):
        seat = choose_seat(config, 1, device, node_resources())  # type: ignore[arg-type]  # one of the key's names
        return hardware_at(seat, config.start_timeout_s)


def hardware_at(seat: Seat, timeout_s: float) -> Hardware:
    """Return what a replica at such a seat of the connected cluster computes on. Raises: ClusterError."""
    here = ray.util.get_node_ip_address()
    if seat.device == "cpu" and all(node.address == here for node in node_resources()):
        return hardware_of("cpu")  # a task would import torch first
    question = ray.remote(num_cpus=seat.num_cpus, num_gpus=seat.num_gpus)(hardware_of).remote(seat.device)
    try:
        return ray.get(question, timeout=timeout_s)
    except GetTimeoutError as error:
        ray.cancel(question, force=True)
        raise ClusterError(
            f"A node must say within ray.start_timeout_s={timeout_s:g} what it computes on; none did. "
            f"{seat.shortage()} Wait for room, or set model.dtype."
        ) from error
    except RayError as error:
        raise ClusterError(
            f"A node must say what it computes on; {str(error).strip().splitlines()[-1]}. Set model.dtype, or mend the "
            "cluster."
        ) from error


def do_jobs(
    work: Callable[[J], A], jobs: Sequence[J], *, num_cpus: int, num_gpus: float = 0, attempts: int = 4
) -> Iterator[A]:
    """Yield the answers as they come, inside `cluster.connect`; at most `attempts` tries per job.

    What a job raises ends those that wait.
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
