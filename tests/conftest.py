"""What all tests share: pinned arithmetic, one private Ray and one S3-compatible server for the whole session."""

import logging
import signal
import uuid
from collections.abc import Iterator

import pytest
import torch


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
    from engine.config import RayConfig

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
