"""What all tests share: checked shapes of arrays, pinned arithmetic, one private Ray and one S3-compatible server."""

import ctypes
import logging
import os
import signal
import uuid
from collections.abc import Iterator

import pytest
import torch

from tests.support.shapes import check_shapes

check_shapes()  # before any test imports the rooms
# Ray starts its workers with niceness 15: beside one busy job they would hardly get a core. Read when Ray starts.
os.environ.setdefault("RAY_worker_niceness", "0")
ON_RAY_S = 900
"""Guard against a test on Ray that hangs: its processes import for a minute where another job is at work."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests on Ray their time; say to pytest-xdist what stays in one process: a module, and the shared Ray."""
    for item in items:
        if item.get_closest_marker("ray") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(ON_RAY_S))
        shares_ray = "ray_cluster" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if shares_ray else item.nodeid.partition("::")[0]))


@pytest.fixture(autouse=True, scope="session")
def _keep_large_buffers() -> None:
    """Keep what convolutions free: glibc gives buffers above 32 MiB back, and the system zeroes them at every use."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; others have none
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, 1 << 30)
        set_option(M_TRIM_THRESHOLD, (1 << 31) - 1)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_bfloat16() -> Iterator[None]:
    """dtype=auto is float32 in all tests, whatever CPU they run on: many compare with networks in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cpu.get_capabilities", lambda: {"cpu_name": "a CPU of the tests"})
        yield


@pytest.fixture(autouse=True, scope="session")
def _hear_interrupts() -> None:
    """A shell that starts the tests in its background makes them and their children ignore SIGINT, which some send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private Ray with 2 CPUs; imported here, so that other tests run without Ray."""
    from actors.cluster import connect
    from engine.core.config import RayConfig

    with connect(RayConfig(address="local"), num_cpus=2, store_bytes=200_000_000):
        yield


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3-compatible server on 127.0.0.1, with the empty bucket "canvases"."""
    import obstore
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    root = obstore.store.HTTPStore(endpoint, client_options={"allow_http": True})
    obstore.put(root, "canvases", b"")  # S3's CreateBucket
    yield endpoint
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A free prefix of the bucket; the environment says how to reach it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-owner")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "told-to-nobody")
    return f"s3://canvases/{uuid.uuid4().hex}"
