"""Start a private Ray on a machine that may be busy, and end what was started; knows no cluster that runs already.

Invariant: a start that failed leaves no process. Source: Ray 2.60, two of whose waits have no setting. Its raylet ends
when an agent, which imports for seconds on an idle core, has not written its ports within 15 s (`node_manager.cc`,
WaitForPersistedPort; ray-project/ray#65983); its driver gives up when the raylet is not there after 30 s
(`_private/node.py`). Hence a node that is more patient (`_PatientNode`); one start at a time; and another try.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import psutil
import ray
from ray import _raylet
from ray._private import node, services
from ray.exceptions import RayError

from actors.environment import temporary_folder
from engine.core.errors import ClusterError

START_TRIES = 3
"""Each takes up to half a minute; the first has read Ray's files, so that later ones are faster."""
TURN_S = 240.0
"""Longest wait for another process's start; one that hangs must not stop all others."""
WAITS = {
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
}
"""The patience of Ray's processes with each other that has a setting, for a machine that is busy."""
REGISTER_S = 180.0
"""Longest wait for the raylet."""
LISTEN_PORT = "dashboard_agent_listen_port"
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", LISTEN_PORT)
"""What the raylet waits for unless it is told, by the names of Ray's RayParams."""
RAYS_OWN = (RuntimeError, ValueError, ConnectionError, RayError)
"""What Ray raises when it does not start or join, beside a bare Exception; see `RayRefusals`."""
SOCKET_PATH_BYTES = 107
"""Of a Unix socket on Linux (sun_path, less its closing zero)."""
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Ray's longest socket below its temporary folder, with the largest process id."""
log = logging.getLogger(__name__)
_persist_port: Any = getattr(_raylet, "persist_port", None)


class RayRefusals:
    """Turns what Ray raises when it cannot start or join into ClusterError; everything else passes.

    A node that does not register within 30 s, and a head without a node, are bare Exceptions (Ray 2.60,
    `_private/node.py` and `_common/utils.py`). Nothing but the type itself tells them: a subclass that is not named
    in RAYS_OWN, such as a KeyError, is a mistake, here or in Ray, and has to be seen as one.
    """

    def __init__(self, what: str, todo: str) -> None:
        self._what, self._todo = what, todo

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is Exception or isinstance(error, RAYS_OWN):
            raise ClusterError(f"{self._what}: {error} {self._todo}") from error


def start_private(num_cpus: int, store_bytes: int) -> None:
    """Start a private Ray, again when the machine is too busy for Ray's patience.

    Raises: ClusterError with Ray's own words.
    """
    check_socket_path()
    with _turn(), _patient_processes():
        for left in reversed(range(START_TRIES)):
            before = set(ray_descendants())
            try:
                _init(num_cpus, store_bytes)
                return
            except ClusterError as error:
                if not left or isinstance(error.__cause__, ValueError):  # a wrong value stays wrong
                    raise
                end_processes(set(ray_descendants()) - before)
                log.warning("A private Ray did not start in Ray's 30 s: this machine is busy. It is tried again.")


def _init(num_cpus: int, store_bytes: int) -> None:
    todo = "Wait until this machine is less busy, or use ray.enabled=false to do without Ray."
    with RayRefusals(f"A private Ray with {num_cpus} CPUs did not start", todo), _patient_node():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=store_bytes,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )


@contextmanager
def _patient_node() -> Iterator[None]:
    """Let ray.init start a `_PatientNode` inside; Ray has no way to ask for one.

    It stands on private names of Ray 2.60. A release without them keeps its own patience, and the tries are left.
    """
    if _persist_port is None or not hasattr(node.Node, "start_ray_processes"):
        yield
        return
    node.Node, original = _PatientNode, node.Node
    try:
        yield
    finally:
        node.Node = original


class _PatientNode(node.Node):
    """A head that has what Ray waits for too short a time: the ports of its agents at once, its raylet in the end."""

    def start_ray_processes(self) -> None:
        ports = dict(zip(AGENT_PORTS, _free_ports(len(AGENT_PORTS)), strict=True))
        for name, port in ports.items():
            setattr(self._ray_params, name, port)
        # The raylet is told all but this one, which it looks for where the agent would write it.
        _persist_port(self._session_dir, self._node_id, LISTEN_PORT, ports[LISTEN_PORT])
        super().start_ray_processes()
        until = time.monotonic() + REGISTER_S
        while not self._is_registered() and self.remaining_processes_alive() and time.monotonic() < until:
            time.sleep(0.1)

    def _is_registered(self) -> bool:
        try:
            services.get_node(self.gcs_address, self._node_id)
        except RuntimeError:  # Ray's own wait, which comes after this one, takes it for "not yet", too
            return False
        return True


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now. One that another process takes before Ray does fails the start, which is tried
    again.
    """
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def _turn() -> Iterator[None]:
    """Be the only process of this user on this machine that starts a private Ray inside, or has waited TURN_S.

    Raises: ClusterError when Ray's temporary folder cannot be written.
    """
    path = temporary_folder() / f"ray_starts_{os.getuid()}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # as Ray does
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ClusterError(
            f"Ray's temporary folder must be writable; {path} is not ({error.strerror}). Set RAY_TMPDIR to a folder "
            "that is, or ray.enabled=false."
        ) from error
    try:
        until = time.monotonic() + TURN_S
        while not _locked(descriptor) and time.monotonic() < until:
            time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)  # which unlocks, as the end of the process does


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _patient_processes() -> Iterator[None]:
    """Let processes that Ray starts inside wait longer for each other, unless the user has said how long."""
    added = [name for name in WAITS if name not in os.environ]
    os.environ.update({name: WAITS[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def check_socket_path() -> None:
    """Refuse a folder below which Ray's sockets would get paths that the kernel refuses. Raises ClusterError."""
    folder = temporary_folder()
    if len(path := os.fsencode(f"{folder}{_SOCKET}")) > SOCKET_PATH_BYTES:
        raise ClusterError(
            f"Ray's sockets must have paths of at most {SOCKET_PATH_BYTES} bytes; below RAY_TMPDIR={folder} they have "
            f"{len(path)}. Set RAY_TMPDIR to a shorter folder, such as /tmp, or ray.enabled=false."
        )


def end_processes(ours: set[psutil.Process]) -> None:
    """Disconnect, and see these processes end."""
    ray.shutdown()
    _, alive = psutil.wait_procs(ours, timeout=5)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            try:
                end(process)
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(alive, timeout=3)
    if alive:
        log.warning("Processes of the private Ray did not end: %s.", sorted(p.pid for p in alive))


def ray_descendants() -> Iterator[psutil.Process]:
    """Yield the Ray processes below this one; a Process knows its start time, so a reused pid is not mistaken for it.

    Other children (data loaders, a user's shell) are told apart by the command line: Ray's own titles, its package
    folder, or a parent that is Ray's.
    """
    package = os.path.dirname(ray.__file__)
    rays: set[int] = set()
    for process in psutil.Process().children(recursive=True):  # parents come before their children
        try:
            command, parent = process.cmdline(), process.ppid()
        except psutil.NoSuchProcess:
            continue
        if parent in rays or any(word.startswith(("ray::", package)) for word in command):
            rays.add(process.pid)
            yield process
