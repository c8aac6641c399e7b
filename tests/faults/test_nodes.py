"""Whole nodes of a Ray cluster that die, the head among them, and a private Ray that does not start."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from engine.core.cli import PROJECT_ROOT
from tests.faults.ledger import Ledger
from tests.faults.scene import Scene

pytestmark = [pytest.mark.faults, pytest.mark.ray]
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(PROJECT_ROOT)}
"""cluster_utils knows no tokens. Inherited settings of the suite's own Ray must not leak into another one."""
END_S = 600
HANG_RAYLET = """
import os, signal, sys, threading, time
import psutil
import generate_large

def freeze():  # the second try's raylet, too
    while True:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.name() == "raylet":
                    process.send_signal(signal.SIGSTOP)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.01)

threading.Thread(target=freeze, daemon=True).start()
sys.exit(generate_large.main(sys.argv[1:]))
"""


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | QUIET


@dataclass(frozen=True)
class Cluster:
    address: str
    nodes: list[list[int]]
    """The processes of each node, the head's first."""

    def kill_node(self, number: int, keep: int = 0) -> None:
        """SIGKILL everything that runs on a node, as a power cut does; `keep` is a process that is not on it."""
        for pid in self.nodes[number]:
            try:
                process = psutil.Process(pid)
                victims = [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for victim in victims:
                if victim.pid != keep and victim.is_running():
                    victim.kill()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three nodes with a CPU each; gone afterwards, whatever was killed."""
    script = Path(__file__).with_name("nodes.py")
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        found = Cluster(**json.loads(process.stdout.readline()))
        try:
            yield found
        finally:
            for number in reversed(range(len(found.nodes))):
                found.kill_node(number)
            process.stdin.close()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def driver(
    scene: Scene, folder: Path, log: Path, *more: str, code: str | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command in a fresh process, which Ray needs; ended with all that it started."""
    command = [sys.executable, *(["-c", code] if code else [str(PROJECT_ROOT / "generate_large.py")])]
    argv = [*scene.flags, "--ray.enabled=true", f"--output.folder={folder}", *more]
    with log.open("w") as out, subprocess.Popen(
        [*command, *argv], env=environment(), stdout=out, stderr=out, text=True
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                left = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                try:
                    process.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()
                for child in psutil.wait_procs(left, timeout=10)[1]:
                    child.kill()


def wait_for_commit(folder: Path, commits: int, process: subprocess.Popen[str]) -> None:
    state = folder / "state.json"
    while not (state.exists() and json.loads(state.read_text())["commits"] >= commits):
        assert process.poll() is None, "the run ended before the fault"
        time.sleep(0.02)


def busy_node(cluster: Cluster) -> int:
    """Return a node other than the head whose replica is at work; wait for one. Ray names a worker by what it does."""
    until = time.monotonic() + END_S
    while time.monotonic() < until:
        for number in (1, 2):
            for child in psutil.Process(cluster.nodes[number][-1]).children(recursive=True):
                with suppress(psutil.Error):  # it may end meanwhile
                    if " ".join(child.cmdline()).startswith("ray::DenoiserActor.denoise"):
                        return number
        time.sleep(0.01)
    raise AssertionError("no replica was at work on a node other than the head")


def test_node_killed_in_a_run(long_scene: Scene, ledger: Ledger, cluster: Cluster, tmp_path: Path) -> None:
    """Its replica, and what lay in its object store, are gone; the run goes on with the others."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with ledger.trial("cluster", "SIGKILL of a whole node of three") as trial:
        address = f"--ray.address={cluster.address}"
        with driver(long_scene, folder, log, address, "--ray.replicas=3", "--ray.max_attempts=20") as process:
            victim = busy_node(cluster)
            wait_for_commit(folder, 1, process)
            cluster.kill_node(victim)
            assert process.wait(timeout=END_S) == 0, log.read_text()
        long_scene.assert_same(folder)
        restarts = json.loads((folder / "report.json").read_text())["restarts"]
        assert restarts >= 1
        trial.outcome = f"the run went on, {restarts} replica(s) replaced"


@pytest.mark.parametrize("part", ["whole head", "its raylet", "its GCS"])
def test_head_killed_in_a_run(long_scene: Scene, ledger: Ledger, cluster: Cluster, tmp_path: Path, part: str) -> None:
    """Ray itself would end the driver without a word after a minute."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with ledger.trial("cluster", f"SIGKILL of the Ray head ({part})") as trial:
        with driver(long_scene, folder, log, f"--ray.address={cluster.address}") as process:
            wait_for_commit(folder, 2, process)
            if part == "whole head":
                cluster.kill_node(0, keep=process.pid)
            else:
                name = {"its raylet": "raylet", "its GCS": "gcs_server"}[part]
                next(p for p in map(psutil.Process, cluster.nodes[0]) if p.name() == name).kill()
            code = process.wait(timeout=END_S)
        said = log.read_text()
        assert code == 1, said
        assert "repeat the same command" in said
        assert "Traceback" not in said
        if part == "whole head":
            with driver(long_scene, folder, log, "--ray.replicas=1") as process:
                assert process.wait(timeout=END_S) == 0, log.read_text()
            long_scene.assert_same(folder)
        else:
            long_scene.assert_resumes(folder, log)
        again = "on a new head" if part == "whole head" else "without Ray"
        trial.outcome = f"ended with a message, exit code 1; resumed {again}"


def test_driver_killed_on_a_cluster_and_resumed_on_a_private_ray(
    scene: Scene, ledger: Ledger, cluster: Cluster, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    with ledger.trial("cluster", "SIGKILL of a driver on a cluster, resumed on another head") as trial:
        with driver(scene, folder, log, f"--ray.address={cluster.address}") as process:
            wait_for_commit(folder, 2, process)
            process.kill()
            process.wait()
        with driver(scene, folder, log, "--ray.replicas=1") as process:
            assert process.wait(timeout=END_S) == 0, log.read_text()
        scene.assert_same(folder)
        trial.outcome = "resumed on a new head"


def test_sigterm_on_a_private_ray(scene: Scene, ledger: Ledger, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    with ledger.trial("cluster", "SIGTERM of a run with a private Ray") as trial:
        with driver(scene, folder, log, "--ray.replicas=1") as process:
            wait_for_commit(folder, 2, process)
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=END_S) == 143, log.read_text()
            assert psutil.wait_procs(children, timeout=30)[1] == []
        assert "run the same command again to continue" in log.read_text()
        scene.assert_resumes(folder, log)
        trial.outcome = "exit code 143, no process left; resumed"


def test_ray_that_does_not_start(scene: Scene, ledger: Ledger, tmp_path: Path) -> None:
    """A raylet frozen at birth: Ray gives up after 30 s with a bare Exception."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with ledger.trial("cluster", "a private Ray that does not start") as trial:
        with driver(scene, folder, log, code=HANG_RAYLET) as process:
            assert process.wait(timeout=END_S) == 1, log.read_text()
        assert "A private Ray with" in log.read_text()
        assert "did not start" in log.read_text()
        assert "Traceback" not in log.read_text()
        scene.assert_resumes(folder, log)
        trial.outcome = "ended with a message, exit code 1; made without Ray"
