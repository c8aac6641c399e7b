"""Replicas that die, hang, lie, starve, join and leave during a whole run: the picture's bytes stay the same.

tests/actors/test_pool.py has the same faults call by call; here they meet the real coordinator.
"""

import io
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core.cli import parse
from engine.core.config import RayConfig
from engine.core.errors import ReplicaLostError
from engine.core.progress import Progress
from engine.core.runtime import hardware_of
from engine.generation.run import prepare, run
from engine.generation.session import Backend
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig
from engine.sampling.denoiser import DecodeBatch, DecodedBatch, EncodeBatch, EncodedBatch, TileBatch, TilePrediction
from tests.faults.ledger import Ledger
from tests.faults.scene import Scene
from tests.faults.sick import Sickness, sick_actor

LONG = pytest.mark.faults
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
PATIENT = RayConfig(max_attempts=20)
EVERY_S = 1.5
"""A replica joins or leaves so often; one takes longer than that to start, so that some leave before they are ready."""


def config_of(scene: Scene, folder: Path, ray: RayConfig) -> RunConfig:
    """Return the scene's run as a config, with other replicas."""
    assert folder.name == "run"
    return replace(parse([*scene.flags, f"--output.folder={folder}"], RunConfig, "faults", ""), ray=ray)


StartBackend = Callable[[ZoomLDM, RunConfig], AbstractContextManager[Backend]]


def on_pool(stats: dict[str, int], disturb: Callable | None = None) -> StartBackend:
    """Return what puts a run on a pool; `disturb` may stand between the coordinator and the pool."""
    from actors.pool import DenoiserPool

    @contextmanager
    def start_backend(model: ZoomLDM, config: RunConfig) -> Iterator[Backend]:
        with DenoiserPool(model, config.ray, threads=config.model.threads, device=config.model.device) as pool:
            pool.wait_ready()
            yield Backend(disturb(pool) if disturb else pool, hardware_of("cpu"), lambda: pool.stats.replicas, dict)
            stats.update(restarts=pool.stats.restarts, retries=pool.stats.retries)

    return start_backend


SICK: list[tuple[Sickness, int, RayConfig, str]] = [
    ("killed", 3, PATIENT, "SIGKILL of a replica inside a call"),
    ("hangs", 2, replace(PATIENT, batch_timeout_s=20), "a replica that hangs"),
    ("NaN", 2, PATIENT, "a replica that answers NaN"),
    ("wrong shape", 2, PATIENT, "a replica that answers the wrong shape"),
    ("another batch's answer", 2, PATIENT, "a replica that answers for another batch"),
    ("out of memory", 1, PATIENT, "a replica out of memory once"),
    ("out of memory", 3, PATIENT, "a replica out of memory again and again"),
]


@pytest.mark.parametrize(
    ("sickness", "times", "ray", "name"),
    [pytest.param(*c, marks=LONG if n else (), id=c[3]) for n, c in enumerate(SICK)],
)
def test_sick_replicas(
    scene: Scene, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    sickness: Sickness, times: int, ray: RayConfig, name: str,
) -> None:  # fmt: skip
    import actors.replica

    monkeypatch.setattr(actors.replica, "DenoiserActor", sick_actor(sickness, tmp_path / "tokens", times))
    stats: dict[str, int] = {}
    with ledger.trial("replicas", f"{name}, {times} in a run") as trial:
        run(prepare(config_of(scene, tmp_path / "run", ray)), on_pool(stats), Progress(io.StringIO()))
        scene.assert_same(tmp_path / "run")
        assert not list((tmp_path / "tokens").iterdir())
        assert stats["restarts" if sickness in ("killed", "hangs") else "retries"] >= (
            times > 1 or sickness != "out of memory"
        )
        trial.outcome = f"{stats['restarts']} replaced, {stats['retries']} batches evaluated again"


@LONG
def test_memory_that_never_suffices_is_an_error_and_the_run_resumes(
    scene: Scene, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import actors.replica

    with ledger.trial("replicas", "a batch that fits into no replica's memory") as trial:
        job = prepare(config_of(scene, tmp_path / "run", RayConfig(max_attempts=2)))
        with monkeypatch.context() as patch:
            patch.setattr(
                actors.replica, "DenoiserActor", sick_actor("out of memory", tmp_path / "tokens", 500, every=1)
            )
            with pytest.raises(ReplicaLostError, match=r"max_attempts=2.*out of memory.*sampling\.batch_size"):
                run(job, on_pool({}), Progress(io.StringIO()))
        run(job, on_pool({}), Progress(io.StringIO()))
        scene.assert_same(tmp_path / "run")
        trial.outcome = "stopped with what to do; resumed on replicas with memory"


class Restless:
    """DenoiseTiles over a pool whose replicas join and leave all the time, and are killed now and then."""

    def __init__(self, pool, counts: dict[str, int]) -> None:
        self._pool, self._counts, self._at = pool, counts, time.monotonic()

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        yield from self._disturbed(self._pool.denoise(batches))

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        yield from self._disturbed(self._pool.decode(batches))

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        yield from self._disturbed(self._pool.encode(batches))

    def _disturbed(self, answers: Iterator) -> Iterator:
        for answer in answers:
            if time.monotonic() - self._at > EVERY_S:
                self._at = time.monotonic()
                number = sum(self._counts.values())
                self._do(("joins", "joins", "leaves", "kills", "leaves")[number % 5])
            yield answer

    def _do(self, what: str) -> None:
        self._counts[what] += 1
        if what == "joins":
            self._pool.add_replica()
        elif what == "leaves":
            self._pool.remove_replica()
        else:
            os.kill(self._pool.replicas[0].pid, signal.SIGKILL)


@LONG
def test_replicas_that_come_and_go_for_a_whole_run(long_scene: Scene, ledger: Ledger, tmp_path: Path) -> None:
    with ledger.trial("replicas", f"a replica joins, leaves or is killed every {EVERY_S:g} s of a whole run") as trial:
        counts, stats = dict.fromkeys(("joins", "leaves", "kills"), 0), dict[str, int]()
        config = config_of(long_scene, tmp_path / "run", replace(PATIENT, replicas=1))
        run(prepare(config), on_pool(stats, lambda pool: Restless(pool, counts)), Progress(io.StringIO()))
        long_scene.assert_same(tmp_path / "run")
        assert min(counts.values()) >= 1, counts
        trial.outcome = f"{counts['joins']} joined, {counts['leaves']} left, {counts['kills']} killed; " + (
            f"{stats['restarts']} replaced, {stats['retries']} batches evaluated again"
        )
