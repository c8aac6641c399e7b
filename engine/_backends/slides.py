"""Who plans, reads and encodes slides on Ray; in this process it is `local_backend` of the pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager

from engine.core.runtime import announce_address
from engine.datasets.blocks import PrepareStages, PrepareTask
from engine.features.blocks import ExtractTask
from engine.features.config import ExtractConfig
from engine.features.encoders import ExtractStages
from engine.pipeline.stages import Backend, Block, Pixels, Stages, Task


@contextmanager
def extract_on_ray(config: ExtractConfig, names: tuple[str, str]) -> Iterator[Backend[ExtractTask]]:
    """Read and encode on the workers of a Ray cluster, or of a private Ray."""
    with _on_ray(ExtractStages(config, names)) as backend:
        yield backend


@contextmanager
def prepare_on_ray(stages: PrepareStages) -> Iterator[Backend[PrepareTask]]:
    """Prepare on the workers of a Ray cluster, or of a private Ray."""
    with _on_ray(stages) as backend:
        yield backend


@contextmanager
def _on_ray(stages: Stages[Task, Block, Pixels]) -> Iterator[Backend[Task]]:
    """Do the stages of a slide pipeline on the workers of a Ray cluster, or of a private Ray."""
    ray = stages.config.ray
    announce_address(ray.address)
    from actors.cluster import connect
    from actors.slide_pipeline import slides_on_ray

    with connect(ray):
        yield slides_on_ray(stages)
