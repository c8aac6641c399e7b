"""What all tests share: pinned arithmetic, and one private Ray for the whole session."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private Ray with 2 CPUs; imported here, so that other tests run without Ray."""
    from actors.cluster import connect
    from engine.config import RayConfig

    with connect(RayConfig(address="local"), num_cpus=2, store_bytes=200_000_000):
        yield
