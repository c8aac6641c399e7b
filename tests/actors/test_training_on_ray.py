"""Ray Train around the same training: one worker gives this process's bytes, a lost one is replaced."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.errors import PreparedMismatchError
from engine.training.denoiser import train as denoiser_training
from engine.training.denoiser.settings import JointConfig, WorkerSettings
from tests.support.known_run import LEARN, tiny_config, write_autoencoder, write_data

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray_training")
    write_data(folder / "data", write_autoencoder(folder / "vae"))
    return folder


def state_of(config: JointConfig) -> dict[str, torch.Tensor]:
    return torch.load(Path(config.run) / "denoiser.pt", weights_only=True)["module"]


@pytest.mark.usefixtures("ray_cluster")
def test_one_ray_worker_gives_this_processes_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is given relative paths: they are the driver's."""
    from actors.training import train_on_ray

    monkeypatch.chdir(root)
    here = tiny_config(root, "here", replace(LEARN, steps=4))
    there = replace(here, data="data", run="there", ray=WorkerSettings(workers=1))
    denoiser_training.train(here)
    train_on_ray(there)
    expected, got = state_of(here), state_of(there)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


@pytest.mark.usefixtures("ray_cluster")
def test_a_lost_worker_costs_the_steps_since_the_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two workers is killed with SIGKILL once; the group starts again and ends as one worker would."""
    import actors.training

    begun: list[int] = []
    fit = actors.training._fit

    def count(*args: object) -> None:
        begun.append(1)
        fit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(actors.training, "_fit", count)
    monkeypatch.setattr(actors.training, "_work", kill_once(root / "killed"))
    config = tiny_config(root, "lost", replace(LEARN, steps=4), ray=WorkerSettings(workers=2, max_failures=1))
    actors.training.train_on_ray(config)
    assert (root / "killed").exists()
    assert len(begun) == 2
    assert "continuing denoiser at step 2 of 4" in (root / "lost" / "log.txt").read_text()
    alone = tiny_config(root, "alone", replace(LEARN, steps=4))
    denoiser_training.train(alone)
    expected, got = state_of(alone), state_of(config)
    # AdamW moves a weight by the learning rate however small its gradient: where that is rounding alone, as of a bias
    # before a normalisation, two workers and one go different ways. A step lost or done twice would move them all.
    off = torch.cat([(value - got[name]).float().flatten() for name, value in expected.items()])
    assert off.square().mean().sqrt() < 0.1 * LEARN.lr


def kill_once(mark: Path):
    """Return a worker's work in which rank 1 dies in the fourth step, the first time."""
    import ray.train

    def work(job: dict[str, Any]) -> None:
        from actors.training import _work
        from engine.training.denoiser.train import DenoiserLesson

        losses, rank, begun = DenoiserLesson.losses, ray.train.get_context().get_world_rank(), []

        def dying(self: DenoiserLesson, *args: Any) -> Any:
            begun.append(1)
            if len(begun) == 4 and rank == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return losses(self, *args)

        DenoiserLesson.losses = dying  # type: ignore[method-assign]
        _work(job)

    return work


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_worker_refuses_is_said_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import actors.training

    begun: list[int] = []
    fit = actors.training._fit
    monkeypatch.setattr(actors.training, "_fit", lambda *args: (begun.append(1), fit(*args)))
    config = tiny_config(root, "refused", ray=WorkerSettings(workers=1))
    config = replace(config, model=replace(config.model, encoder="uni"))
    with pytest.raises(PreparedMismatchError, match="encoder is 'demo'"):
        actors.training.train_on_ray(config)
    assert begun == [1]
