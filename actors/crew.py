"""The crew of commands that sample a canvas: the replicas of a Ray cluster, or of a private Ray."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from actors.cluster import connect
from actors.metrics import RunMetrics
from actors.pool import DenoiserPool
from engine.config import RunConfig
from engine.model.zoomldm import ZoomLDM
from engine.run import Crew


@contextmanager
def work_on_ray(connection: ExitStack, model: ZoomLDM, config: RunConfig) -> Iterator[Crew]:
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

        yield Crew(pool, pool.replicas[0].hardware, lambda: pool.stats.replicas, facts, metrics)
