"""What replicas compute on: asked of the cluster's node; a private Ray is this machine and is not started for it."""

import os

import pytest
import ray

from actors import backend
from actors.backend import hardware_at, hardware_of_replicas
from actors.replica import Seat
from engine.core.config import RayConfig
from engine.core.errors import ClusterError
from engine.core.runtime import Hardware, hardware_of


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the nodes look like other machines."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.1")


def test_a_private_ray_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(backend, "joins_cluster", lambda _: False)
    monkeypatch.setattr(backend, "connect", None)  # it must not be started
    assert hardware_of_replicas(RayConfig(), "cpu") == hardware_of("cpu")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "elsewhere")
def test_a_node_of_the_cluster_is_asked() -> None:
    told = hardware_of_replicas(RayConfig(), "auto")
    assert isinstance(told, Hardware)
    assert told.device == "cpu"
    assert told != hardware_of("cpu")  # which the tests have put a name of their own to


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "elsewhere")
def test_a_node_that_does_not_come_is_named() -> None:
    with pytest.raises(ClusterError, match=r"must say within ray.start_timeout_s=0\.5.*takes 64 CPU"):
        hardware_at(Seat("cpu", 64, 0), 0.5)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_workers_are_no_nicer_than_their_driver() -> None:
    of_worker = ray.remote(lambda: os.getpriority(os.PRIO_PROCESS, 0))
    assert ray.get(of_worker.remote()) == os.getpriority(os.PRIO_PROCESS, 0)
