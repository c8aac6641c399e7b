"""Who makes the rows of a cohort on Ray; in this process it is `make_alone`."""

from collections.abc import Iterator
from contextlib import contextmanager

from engine.cohort.config import CohortConfig
from engine.cohort.run import MakeRows
from engine.core.progress import ProgressCallback
from engine.core.runtime import announce_address
from engine.model.config import ModelConfig


@contextmanager
def make_on_ray(config: CohortConfig, model: ModelConfig, watch: ProgressCallback) -> Iterator[MakeRows]:
    """Make rows by coordinators on a Ray cluster, or on a private Ray."""
    announce_address(config.ray.address)
    from actors.cohort import rows_on_ray

    with rows_on_ray(config, model, watch) as make:
        yield make
