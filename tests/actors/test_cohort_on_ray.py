"""Cohorts on Ray: the bytes of one process, whoever is killed; shares of replicas; threads over one pool."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from actors.cohort import shares
from actors.pool import DenoiserPool
from engine._backends.cohort import make_on_ray
from engine.cohort.output import DONE
from engine.cohort.run import make_alone, make_cohort
from engine.core.config import RayConfig
from engine.core.progress import Progress
from engine.sampling.denoiser import LocalDenoiser
from tests.support.denoiser_contract import bytes_of, tile_batch, tiny_model
from tests.support.known_cohort_job import BAGS, job, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
ON_RAY = {"ray.enabled": True, "ray.replicas": 2, "coordinators": 2, "pictures_at_once": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_inputs(folder)
    return folder


def rows(inputs: Path) -> list[dict[str, object]]:
    table: list[dict[str, object]] = [
        {"name": f"r{n}", "embeddings": str(inputs / "cells.npy"), "seed": n, "source_patient": f"P{n}", "label": "a"}
        for n in range(4)
    ]
    return [*table, {"name": "s", "reference": "s0", "region": "0,0,320,256", "source_patient": "P0", "label": "a"}]


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    make_cohort(job(inputs, out, rows(inputs)), make_alone, Progress())
    return out


def files_of(out: Path, folder: str = "pictures") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / folder).iterdir()) if path.is_file()}


def coordinators() -> list[psutil.Process]:
    """The processes of coordinators below this one's Ray; Ray names a worker by what it does."""
    there = psutil.process_iter(["cmdline"])
    return [p for p in there if any(word.startswith("ray::Coordinator") for word in p.info["cmdline"] or ())]


def test_the_bytes_of_one_process(inputs: Path, alone: Path, tmp_path: Path) -> None:
    records = make_cohort(job(inputs, tmp_path / "out", rows(inputs), **ON_RAY), make_on_ray, Progress())
    assert [r.status for r in records] == [DONE] * 5, records
    assert files_of(tmp_path / "out") == files_of(alone)
    assert not psutil.wait_procs(coordinators(), timeout=60)[1], "nobody is left"


def test_a_killed_coordinator_costs_time_alone(inputs: Path, alone: Path, tmp_path: Path) -> None:
    killed: list[int] = []
    over = threading.Event()

    def kill_one_at_work() -> None:
        """Kill the first coordinator that has committed something."""
        while not over.is_set() and not killed:
            if list((tmp_path / "out/runs").glob("*/state.json")) and (found := coordinators()):
                os.kill(found[0].pid, signal.SIGKILL)
                killed.append(found[0].pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    try:
        config = job(inputs, tmp_path / "out", rows(inputs), **(ON_RAY | {"coordinators": 1}))
        records = make_cohort(config, make_on_ray, Progress())
    finally:
        over.set()
        killer.join()
    assert killed
    assert [r.status for r in records] == [DONE] * 5, records
    assert files_of(tmp_path / "out") == files_of(alone)


def test_bags_have_the_bytes_of_one_process(inputs: Path, tmp_path: Path) -> None:
    for name, start, more in (("alone", make_alone, {}), ("ray", make_on_ray, ON_RAY)):
        config = job(inputs, tmp_path / name, rows(inputs)[3:], **(BAGS | {"bags.tiles": 2} | more))
        assert [r.status for r in make_cohort(config, start, Progress())] == [DONE] * 2
    assert files_of(tmp_path / "ray", "features") == files_of(tmp_path / "alone", "features")


def test_threads_share_a_pool(ray_cluster: None) -> None:
    """Each thread gets its own answers in its own order, whoever settles them."""
    wanted = bytes_of(LocalDenoiser(tiny_model()).denoise(map(tile_batch, range(6))))
    found: dict[int, list[tuple[str, bytes, bytes]]] = {}
    with DenoiserPool(tiny_model(), RayConfig(replicas=2)) as pool:
        pool.wait_ready()

        def ask(number: int) -> None:
            found[number] = bytes_of(pool.denoise(map(tile_batch, range(6))))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert list(found.values()) == [wanted] * 3


@pytest.mark.parametrize(
    ("replicas", "rows_", "coordinators_", "wanted"),
    [(1, 9, None, [1]), (4, 9, None, [4]), (5, 9, None, [3, 2]), (64, 99, None, [4] * 16), (64, 3, None, [22, 21, 21]),
     (2, 9, 5, [1, 1])],
)  # fmt: skip
def test_shares(
    inputs: Path, tmp_path: Path, replicas: int, rows_: int, coordinators_: int | None, wanted: list[int]
) -> None:
    config = job(inputs, tmp_path / "out", rows(inputs), coordinators=coordinators_)
    assert shares(config, replicas, rows_) == wanted
