"""Connect to a cluster or start a private Ray, and leave no process behind; knows no model and no batch.

Invariant: what was started here is gone on every way out; what was not is neither joined unasked nor ended.
Source: Ray 2.60, `ray.init`; its "auto" and its default patience are not used, for the reasons given below.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import psutil
import ray
from ray.exceptions import RaySystemError

from actors.environment import announcement, silence_of
from actors.private_ray import RayRefusals, end_processes, ray_descendants, start_private
from engine.core.config import RayConfig
from engine.core.errors import ClusterError
from engine.core.exits import SIGTERM_EXIT, sigterm_as_exit

ANSWER_S = 5.0
"""Patience for a head's first answer."""
ATTACH_TRIES_VARIABLE = "RAY_gcs_server_port_wait_time_s"
ATTACH_TRIES = 5
"""Ray's tries, one second apart, to register with a head that answers."""
RECONNECT_VARIABLE, RECONNECT_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
"""After this long without the head, Ray's core ends the whole process, whatever it is doing."""
STORE_BYTES = 1 << 30
"""Object store of a private Ray: weights live in it once; what does not fit goes to disk, slower but whole."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeResources:
    """What one living node of the cluster offers, whether in use or not."""

    address: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.address}: {self.cpus:g} CPU, {self.gpus:g} GPU"


def node_resources() -> list[NodeResources]:
    """List the living nodes of the connected cluster. Raises ClusterError when its head is gone."""
    _await_head()
    return [
        NodeResources(node["NodeManagerAddress"], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _await_head() -> None:
    """Return as soon as the head answers.

    Ray's own calls would wait for it in the core, which then ends the process without a word of ours; half of the
    core's patience leaves time to say so and to leave. A head that is started again meanwhile is found again.
    Raises: ClusterError.
    """
    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    patience_s = float(os.environ.get(RECONNECT_VARIABLE, RECONNECT_S)) / 2
    until = time.monotonic() + patience_s
    while (silence := silence_of(host.strip("[]"), int(port), ANSWER_S)) is not None:
        if time.monotonic() > until:
            raise ClusterError(
                f"The head of the Ray cluster at {address} must answer within {patience_s:g} s; {silence}. Every "
                "finished step is kept: start a cluster, or let a private Ray start, and repeat the same command."
            )
        time.sleep(min(1.0, patience_s / 10))


@contextmanager
def loss_named() -> Iterator[None]:
    """Raise ClusterError when this process has lost its node or its connection, before or inside the `with`.

    Seconds after the raylet's death, when the head says that the node is dead, Ray's core would end the process
    without a word: enter this at least once a second.
    """
    raylet = _raylet_of(ray.get_runtime_context().get_node_id())
    if raylet is not None and not _lives(raylet):
        raise _node_gone("its raylet has died")
    try:
        yield
    except (OSError, RaySystemError) as error:
        raise _node_gone(str(error)) from error


def _node_gone(why: str) -> ClusterError:
    return ClusterError(
        f"The Ray node of this process must stay up for the whole run; it is gone ({why}). Every finished step "
        "is kept: start a cluster, or let a private Ray start, and repeat the same command."
    )


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@cache
def _raylet_of(node: str) -> psutil.Process | None:
    """Return the raylet of this process's node, found once; None where it is out of sight, as from a container."""
    socket = next((found["RayletSocketName"] for found in ray.nodes() if found["NodeID"] == node), None)
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and f"--raylet_socket_name={socket}" in (process.info["cmdline"] or ()):
            return process
    return None


@contextmanager
def connect(config: RayConfig, *, num_cpus: int | None = None, store_bytes: int = STORE_BYTES) -> Iterator[None]:
    """Be connected to Ray inside the `with`.

    `config.address`, else RAY_ADDRESS, names a cluster to join: host:port, or "auto" for the one `ray start` has
    left on this machine (needed under `ray submit`, which sets no RAY_ADDRESS). Without either, or with "local", a
    private Ray starts with `num_cpus` (None: the CPUs this process may use) and `store_bytes`; both are ignored when
    joining. A process that is connected already stays so. SIGTERM becomes SystemExit(143) inside, so that it cleans
    up like Ctrl-C.
    Raises: ClusterError when the cluster does not answer within about 15 s, or a private Ray does not start.
    """
    if ray.is_initialized():
        yield
        return
    address = _address(config)
    before = set(ray_descendants())
    started: set[psutil.Process] = set()
    with sigterm_as_exit() as take_sigterm:
        try:
            with _rays_exits_named(), _sigterm_kept():
                if address is None:
                    start_private(num_cpus or len(os.sched_getaffinity(0)), store_bytes)
                else:
                    _join(address)
                take_sigterm()  # ray.init has put its own handler there, which exits without a shutdown
            started |= set(ray_descendants()) - before
            yield
        finally:
            with _interrupts_held(), _sigterm_kept():
                end_processes(started | set(ray_descendants()) - before)


@contextmanager
def _rays_exits_named() -> Iterator[None]:
    """Turn the exit of Ray's own handler of SIGTERM, code 15 or 1, into the code that says SIGTERM."""
    try:
        yield
    except SystemExit:
        sys.exit(SIGTERM_EXIT)


def joins_cluster(config: RayConfig) -> bool:
    """Say whether `connect` uses a cluster that runs already, one this process is connected to included."""
    return ray.is_initialized() or _address(config) is not None


def _address(config: RayConfig) -> str | None:
    """Return the cluster to join, or None for a private Ray. Raises ClusterError when "auto" finds none."""
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "local":
        return None
    if address == "auto":
        # Ray's own "auto" would take any head that runs on this machine, also somebody's private one.
        left = announcement()
        if not left.exists():
            raise ClusterError(
                "ray.address=auto needs a cluster started by `ray start` on this machine; found none "
                f"(no {left}). Start one, name host:port, or leave ray.address out for a private Ray."
            )
        address = left.read_text().strip()
    if "://" in address:
        raise ClusterError(
            f"ray.address must be host:port, auto or local; got {address}. Run the command on the cluster instead, "
            "with `ray job submit` or `ray submit`."
        )
    return address


def _join(address: str) -> None:
    """Attach to a running cluster. Raises ClusterError within about 15 s."""
    todo = "Check the address and that `ray status` works there, or leave ray.address out for a private Ray."
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"ray.address must be host:port, auto or local; got {address!r}.")
    hosts = [host]
    if host in ("localhost", "127.0.0.1", "::1"):
        hosts.append(ray.util.get_node_ip_address())  # Ray joins by this one, and a head may listen on it alone
    silences = [silence_of(name.strip("[]"), int(port), ANSWER_S) for name in hosts]
    if None not in silences:
        raise ClusterError(f"No Ray cluster answers at {address}: {silences[-1]}. {todo}")
    chosen = os.environ.get(ATTACH_TRIES_VARIABLE)
    os.environ.setdefault(ATTACH_TRIES_VARIABLE, str(ATTACH_TRIES))
    try:
        with RayRefusals(f"The Ray cluster at {address} refused", todo):
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    finally:
        if chosen is None:
            del os.environ[ATTACH_TRIES_VARIABLE]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM inside: an impatient second one must not cut the clean-up short, which is bounded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in held.items():
            signal.signal(name, handler or signal.SIG_DFL)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep what SIGTERM does while Ray's core starts or ends inside.

    The core installs a handler that prints its stack and dies, and in its shutdown, a second long, the default action.
    It calls sigaction itself, of which Python learns nothing, and has no setting. So a thread looks each millisecond,
    with the functions that Python's own `signal` is made of.
    """
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.argtypes, put.argtypes = [ctypes.c_int], [ctypes.c_int, ctypes.c_void_p]
    get.restype = put.restype = ctypes.c_void_p
    ours, over = get(signal.SIGTERM), threading.Event()

    def keep() -> None:
        while not over.wait(0.001):
            if get(signal.SIGTERM) != ours:
                put(signal.SIGTERM, ours)

    thread = threading.Thread(target=keep, daemon=True, name="sigterm")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def dask_on_ray() -> Iterator[None]:
    """Compute every dask array inside the `with` on the Ray that this process is connected to: reductions over a
    picture that one machine would be long at.

    Handles are opened on the worker that computes, so files must lie where every node sees them. Seen to work with Ray
    2.60 and dask 2026.8. `ray.util.dask.enable_dask_on_ray` is not used: it also sets a key of dask's that is
    deprecated. Raises: ClusterError when it is connected to none; dask would start a private one unasked.
    Source: Ray's "Dask on Ray", `ray_dask_get`.
    """
    import dask.config  # on use: half a second, and few ask for it
    from ray.util.dask import ray_dask_get

    if not ray.is_initialized():
        raise ClusterError(
            "dask arrays can be computed on Ray only by a process that is connected to it; this one is not. Put `with "
            "actors.cluster.connect(RayConfig(address=...))` around, or leave dask_on_ray() out: dask uses threads."
        )
    with dask.config.set(scheduler=ray_dask_get):
        yield
