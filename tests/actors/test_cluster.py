"""connect: what it starts is gone afterwards, what it did not start is left alone, and silence is an error in time."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from actors import cluster, private_ray
from actors.cluster import NodeResources, connect, loss_named, node_resources
from actors.environment import silence_of
from actors.replica import choose_seat
from engine.core.config import RayConfig
from engine.core.errors import ClusterError

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys, time
import psutil
from actors.cluster import connect, node_resources
from engine.core.config import RayConfig

with connect(RayConfig(), num_cpus=1, store_bytes=100_000_000):
    pids = [p.pid for p in psutil.Process().children(recursive=True)]
    print(json.dumps([pids, [n.cpus for n in node_resources()]]), flush=True)
    if sys.argv[1] == "error":
        raise RuntimeError("on purpose")
    if sys.argv[1] == "wait":
        time.sleep(600)
"""


def run_script(argument: str, **environment: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, argument],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.ray
@pytest.mark.parametrize(
    ("argument", "number", "code"),
    [
        ("done", None, 0),
        ("error", None, 1),
        ("wait", signal.SIGINT, -signal.SIGINT),
        ("wait", signal.SIGTERM, 143),
    ],
)
def test_no_process_is_left_behind(argument: str, number: signal.Signals | None, code: int) -> None:
    with run_script(argument) as script:
        assert script.stdout is not None
        line = script.stdout.readline()
        assert line, script.communicate()[1]
        pids, cpus = json.loads(line)
        assert cpus == [1]
        assert len(pids) >= 5
        if number is not None:
            os.killpg(script.pid, number) if number == signal.SIGINT else script.send_signal(number)
            time.sleep(0.2)
            if number == signal.SIGINT:  # an impatient second one must not cut the clean-up short
                script.send_signal(number)
        _, errors = script.communicate(timeout=250)
    assert script.returncode == code, errors
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


def test_sigterm_is_taken_back_from_who_took_it_without_a_word() -> None:
    """Ray's core calls sigaction itself, as `PyOS_setsig` does: Python's own record stays."""
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    put.argtypes, put.restype, get.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p, ctypes.c_void_p
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        ours = get(signal.SIGTERM)
        with cluster._sigterm_kept():
            put(signal.SIGTERM, None)  # the default action
            until = time.monotonic() + 60
            while get(signal.SIGTERM) != ours and time.monotonic() < until:
                time.sleep(0.001)
            assert get(signal.SIGTERM) == ours
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_is_joined_is_left_running() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    with run_script("done", RAY_ADDRESS=address) as script:
        line, errors = script.communicate(timeout=250)
    assert script.returncode == 0, errors
    assert json.loads(line) == [[], [2]]
    assert [node["Alive"] for node in ray.nodes()] == [True]
    with connect(RayConfig(address="127.0.0.1:1")):
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let connect run although the session is connected; these tests fail before Ray is called."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    for module in (cluster, private_ray):
        monkeypatch.setattr(module, "ray_descendants", lambda: iter(()))
    monkeypatch.setattr(cluster, "ANSWER_S", 0.2)


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "127.0.0.1:1.*refused"),
        ("head", "host:port"),
        ("ray://head:10001", "ray job submit"),
    ],
)
def test_an_address_that_cannot_be_is_an_error(address: str, words: str) -> None:
    with pytest.raises(ClusterError, match=words), connect(RayConfig(address=address)):
        pass


@pytest.mark.usefixtures("unconnected")
def test_auto_needs_a_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ClusterError, match="ray start"), connect(RayConfig(address="auto")):
        pass
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:2\n")
    with pytest.raises(ClusterError, match="127.0.0.1:2"), connect(RayConfig(address="auto")):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:3")
    for config in (RayConfig(address="auto"), RayConfig()):
        with pytest.raises(ClusterError, match="127.0.0.1:3"), connect(config):
            pass


@pytest.mark.usefixtures("unconnected")
def test_a_head_that_is_frozen_is_an_error_in_time() -> None:
    """A socket that listens and never speaks is what a frozen head looks like."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            pytest.raises(ClusterError, match=f"127.0.0.1:{port}"),
            connect(RayConfig(address=f"127.0.0.1:{port}")),
        ):
            pass


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (Exception("The current node timed out during startup."), ClusterError),  # as Ray raises it
        (RuntimeError("no port"), ClusterError),
        (KeyError("a mistake"), KeyError),
    ],
)
def test_what_ray_says_when_it_does_not_start(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception]
) -> None:
    def init(**_: object) -> None:
        raise raised

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(expected, match=str(raised)), connect(RayConfig()):
        pass


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize(
    ("raised", "failures", "tries"),
    [
        (Exception("The current node timed out during startup."), 1, 2),
        (Exception("The current node timed out during startup."), 9, private_ray.START_TRIES),
        (ConnectionError("no head"), 1, 2),
        (ValueError("a store of 3 bytes"), 9, 1),  # a wrong value stays wrong
    ],
)
def test_a_start_that_was_too_slow_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, raised: Exception, failures: int, tries: int
) -> None:
    calls: list[dict[str, str]] = []

    def init(**_: object) -> None:
        calls.append({name: os.environ[name] for name in private_ray.WAITS})
        if len(calls) <= failures:
            raise raised

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "7")  # what a user says stays
    if failures >= tries:
        with pytest.raises(ClusterError, match=str(raised)), connect(RayConfig()):
            pass
    else:
        with connect(RayConfig()):
            pass
    assert len(calls) == tries
    assert calls[0] == private_ray.WAITS | {"RAY_agent_register_timeout_ms": "7"}
    assert "RAY_gcs_server_port_wait_time_s" not in os.environ
    assert len(caplog.records) == tries - 1
    assert all("busy. It is tried again" in record.message for record in caplog.records)


@pytest.mark.usefixtures("unconnected")
def test_private_rays_start_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(private_ray, "check_socket_path", lambda: None)  # pytest's folder is long
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    inside: list[bool] = []

    def init(**_: object) -> None:
        (path,) = tmp_path.glob("*.lock")
        with path.open() as other:
            inside.append(private_ray._locked(other.fileno()))

    monkeypatch.setattr(cluster.ray, "init", init)
    with connect(RayConfig(address="local")), next(tmp_path.glob("*.lock")).open() as other:
        assert private_ray._locked(other.fileno())  # the turn ends with the start, not with the run
        monkeypatch.setattr(private_ray, "TURN_S", 0.0)  # one that hangs does not stop the others
        private_ray.start_private(1, 1)
    assert inside == [False, False]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ClusterError, match=r"must be writable.*Set RAY_TMPDIR"), connect(RayConfig(address="local")):
        pass


@pytest.mark.usefixtures("unconnected")
def test_a_temporary_folder_that_is_absent_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Ray itself does."""
    monkeypatch.setattr(private_ray, "check_socket_path", lambda: None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "absent" / "tmp"))
    monkeypatch.setattr(cluster.ray, "init", lambda **_: None)
    with connect(RayConfig(address="local")):
        assert (tmp_path / "absent" / "tmp").is_dir()


@pytest.mark.usefixtures("unconnected")
def test_sigterm_heard_by_rays_own_handler_keeps_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """ray.init puts two there: one exits with 15, the other with 1."""
    monkeypatch.setattr(cluster.ray, "init", lambda **_: sys.exit(1))
    with pytest.raises(SystemExit) as stop, connect(RayConfig()):
        pass
    assert stop.value.code == 143


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_head_that_is_gone_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ray's core ends the process without a word; patience is half of the core's."""
    monkeypatch.setenv(cluster.RECONNECT_VARIABLE, "1")
    assert [node.cpus for node in node_resources()] == [2]
    monkeypatch.setattr(cluster, "silence_of", lambda *_: "Connection refused")
    with pytest.raises(ClusterError, match=r"must answer within 0\.5 s; Connection refused.*repeat the same command"):
        node_resources()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("raised", [OSError("Broken pipe"), cluster.RaySystemError("System error: Broken pipe")])
def test_a_node_that_is_gone_under_the_driver_is_named(raised: Exception) -> None:
    """What ray.wait raises when the raylet of this process was killed."""
    with pytest.raises(ClusterError, match=r"it is gone \(.*Broken pipe.*repeat the same command"), loss_named():
        raise raised


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_raylet_that_died_is_named_before_the_core_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cluster._raylet_of(ray.get_runtime_context().get_node_id())
    assert found is not None, "it is on this machine"
    assert found.name() == "raylet"
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        dead = psutil.Process(child.pid)
        while dead.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        monkeypatch.setattr(cluster, "_raylet_of", lambda node: dead)
        with (
            pytest.raises(ClusterError, match=r"it is gone \(.*raylet has died.*repeat the same command"),
            loss_named(),
        ):
            pass


def test_another_server_is_not_a_head() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from actors.environment import silence_of; print(silence_of('127.0.0.1', {port}, 20))",
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        connection, _ = server.accept()
        with connection, client:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert "not a Ray head" in client.communicate(timeout=250)[0]
    assert "refused" in str(silence_of("127.0.0.1", 1, 1.0))


def test_seats() -> None:
    nodes = [NodeResources("a", 16, 4), NodeResources("b", 4, 1), NodeResources("c", 2, 0)]
    gpu = choose_seat(RayConfig(), 4, "auto", nodes)
    assert (gpu.device, gpu.num_gpus, gpu.fit(nodes)) == ("cuda", 1, 5)
    assert choose_seat(RayConfig(gpus_per_replica=0.3), 1, "cuda", nodes).fit(nodes) == 15
    assert choose_seat(RayConfig(gpus_per_replica=2), 1, "cuda", nodes).fit(nodes) == 2
    cpu = choose_seat(RayConfig(), 4, "cpu", nodes)
    assert (cpu.device, cpu.num_cpus, cpu.fit(nodes)) == ("cpu", 4, 5)
    assert choose_seat(RayConfig(), 64, "cpu", nodes).num_cpus == 16  # more threads than cores must not wait for ever
    with pytest.raises(ClusterError, match="c: 2 CPU, 0 GPU"):
        choose_seat(RayConfig(), 1, "cuda", nodes[2:])
    # A number of replicas says what to wait for: the demand a cluster that grows from nothing answers.
    assert choose_seat(RayConfig(replicas=3), 1, "cuda", nodes[2:]).num_gpus == 1
    assert choose_seat(RayConfig(replicas=3), 1, "auto", nodes[2:]).device == "cpu"
    with pytest.raises(ClusterError, match="no node"):
        choose_seat(RayConfig(), 1, "cpu", [])


@pytest.mark.usefixtures("unconnected")
def test_a_temporary_folder_too_long_for_sockets_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = str(tmp_path / ("long" * 20))
    monkeypatch.setenv("RAY_TMPDIR", folder)
    refused = pytest.raises(ClusterError, match=r"at most 107 bytes; below RAY_TMPDIR=.* Set RAY_TMPDIR to a shorter")
    with refused, cluster.connect(RayConfig(address="local")):
        raise AssertionError("it must not start")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    private_ray.check_socket_path()
