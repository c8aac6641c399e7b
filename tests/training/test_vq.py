"""The autoencoder learns to give pictures back, and what is written carries it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core.errors import CheckpointError, PreparedError, PreparedMismatchError
from engine.datasets.schema import read_set_facts
from engine.model.zoomldm import ZoomLDM
from engine.training.autoencoder import train as autoencoder_training
from engine.training.autoencoder.settings import VQConfig, VQSettings
from engine.training.autoencoder.train import AutoencoderLesson
from engine.training.cost import training_table
from engine.training.denoiser.settings import InitialSettings, OutputSettings, WorkerSettings
from engine.training.optimisation import TrainingError
from tests.support.known_prepared import write_slide
from tests.support.known_run import LDM_NETWORKS, NAMES, NETWORKS, write_autoencoder, write_data

LEARN = VQSettings(steps=12, batch_size=4, lr=3e-3, warmup=2, ema=0.5, crop_px=32)


def config_of(root: Path, images: bool = True) -> VQConfig:
    write_data(root / "data", write_autoencoder(root / "vae"), images=images)
    return VQConfig(
        data=str(root / "data"), run=str(root / "run"), device="cpu", precision="float32", threads=1, loaders=0,
        log_every=3, tensorboard=False, model=NETWORKS, initial=InitialSettings(vae=str(root / "vae")), train=LEARN,
        ray=WorkerSettings(enabled=False), output=OutputSettings(folder=str(root / "model")),
    )  # fmt: skip


def test_the_loss_falls_and_the_autoencoder_is_written(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    autoencoder_training.train(config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.95 * losses[0]
    written = ZoomLDM.from_pretrained(tmp_path / "model").vae.state_dict()
    averages = torch.load(tmp_path / "run" / "autoencoder.pt", weights_only=True)["average"]
    assert all(torch.equal(written[name.removeprefix("vae.")], value) for name, value in averages.items())
    assert json.loads((tmp_path / "run" / "training.json").read_text())["psnr_db"].keys() == set(
        NETWORKS.magnifications
    )


def test_codebook_encoder_and_decoder_all_learn(tmp_path: Path) -> None:
    lesson = AutoencoderLesson(config_of(tmp_path))
    part = lesson.read(lesson.draw(0), 0)
    losses, _ = lesson.losses(lesson.networks, part)
    losses.mean().backward()
    idle = [name for name, p in lesson.networks.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    again = lesson.read(lesson.draw(0), 0)
    assert torch.equal(part.images, again.images)


def test_a_set_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreparedError, match="--keep_images"):
        AutoencoderLesson(replace(config_of(tmp_path, images=False)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"encoder": "uni"}, "encoder is 'demo', not 'uni'"),
        ({"ssl_dim": 8}, "ssl_dim is 16, not 8"),
        ({"base_mpp": 0.25}, "base_mpp is 0.5, not 0.25"),
        ({"magnifications": ("1x", "2x", "3x", "4x")}, "magnifications is"),
    ],
)
def test_a_set_of_another_domain_is_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    """Before a step: the slides could not be prepared again with what would be written."""
    config = config_of(tmp_path)
    with pytest.raises(PreparedMismatchError, match=word):
        autoencoder_training.train(replace(config, model=replace(NETWORKS, **change)))


@pytest.mark.parametrize("names", [NAMES[:2], (*NAMES, "1.25x")])
def test_the_set_may_go_less_or_more_far_than_the_model(tmp_path: Path, names: tuple[str, ...]) -> None:
    config = config_of(tmp_path)
    lesson = AutoencoderLesson(replace(config, model=replace(NETWORKS, magnifications=names)))
    assert lesson.source.names == NAMES


def test_the_plan_counts_the_magnifications_of_the_set(tmp_path: Path) -> None:
    """The model knows two more: they take no share of the draws."""
    config = config_of(tmp_path)
    further = replace(NETWORKS, magnifications=(*NAMES, "1.25x", "0.625x"))
    said = training_table(replace(config, model=further)).splitlines()
    assert [line.split() for line in said[2:6]] == [[name, "4", "3.0", "times"] for name in NAMES]
    assert said[6].startswith("step")
    with pytest.raises(PreparedMismatchError, match="encoder is 'demo', not 'uni'"):
        training_table(replace(config, model=replace(NETWORKS, encoder="uni")))


def test_the_plan_says_when_it_guessed_the_workers(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    known = [WorkerSettings(enabled=False), WorkerSettings(enabled=False, workers=2), WorkerSettings(workers=2)]
    told = [training_table(replace(config, ray=ray)) for ray in [WorkerSettings(), *known]]
    assert [("--ray.workers" in text, text.partition(" worker(s)")[0][-1]) for text in told] == [
        (True, "1"), (False, "1"), (False, "1"), (False, "2"),
    ]  # fmt: skip


def test_the_ldm_layout_is_refused_before_a_step(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    output = replace(config.output, ldm=str(tmp_path / "ldm"))
    mute = replace(LDM_NETWORKS, prediction_type="v_prediction")
    with pytest.raises(CheckpointError, match="no words for prediction_type='v_prediction'"):
        autoencoder_training.train(replace(config, model=mute, output=output))
    assert not (tmp_path / "run" / "autoencoder.pt").exists()


class Killed(BaseException):
    pass


def left_by(folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    """Return weights, averages and moments of a run, and its curve."""
    state = torch.load(folder / "autoencoder.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, m in state["optimiser"]["state"].items() for k, v in m.items()}
    curve = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    return state["module"] | {f"average.{k}": v for k, v in state["average"].items()} | moments, curve


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(LEARN, steps=4, batch_size=2)
    config = replace(config_of(tmp_path), checkpoint_s=1e-9, train=short, log_every=1)
    monkeypatch.setattr(AutoencoderLesson, "fidelity", lambda _: {})  # most of the time of so short a run
    autoencoder_training.train(replace(config, run=str(tmp_path / "whole")))
    read = AutoencoderLesson.read

    def read_until(lesson: AutoencoderLesson, samples: Any, step: int) -> Any:
        if step == 2:
            raise Killed
        return read(lesson, samples, step)

    monkeypatch.setattr(AutoencoderLesson, "read", read_until)
    with pytest.raises(Killed):
        autoencoder_training.train(config)
    monkeypatch.setattr(AutoencoderLesson, "read", read)
    assert torch.load(tmp_path / "run" / "autoencoder.pt", weights_only=True)["step"] == 2
    autoencoder_training.train(config)
    (expected, curve), (got, again) = left_by(tmp_path / "whole"), left_by(tmp_path / "run")
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert again == curve


def test_a_loss_that_is_not_finite_names_its_patch_and_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config_of(tmp_path), train=replace(LEARN, max_skipped=0))
    losses, lesson = AutoencoderLesson.losses, AutoencoderLesson(config)
    culprit = lesson.name(lesson.draw(1)[2])

    def spoilt(lesson: AutoencoderLesson, call: Any, part: Any) -> Any:
        found, classes = losses(lesson, call, part)
        bad = torch.tensor([sample == culprit for sample in map(lesson.name, part.samples)])
        return torch.where(bad, torch.nan, found), classes

    monkeypatch.setattr(AutoencoderLesson, "losses", spoilt)
    with pytest.raises(TrainingError, match=re.escape(culprit)) as stop:
        autoencoder_training.train(config)
    assert str(stop.value).count(" patch ") == 1
    assert not (tmp_path / "model").exists()


def test_images_that_are_cut_off_are_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    path = tmp_path / "data" / "slides" / "left" / "10x" / "images.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PreparedError, match=r"left/10x/images\.npy must hold all of its .* it is cut off"):
        autoencoder_training.train(config)


def test_another_seed_or_set_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoencoderLesson, "fidelity", lambda _: {})
    config = replace(config_of(tmp_path), train=replace(LEARN, steps=1))
    autoencoder_training.train(config)
    with pytest.raises(TrainingError, match="seed was 0, now 1"):
        autoencoder_training.train(replace(config, seed=1))
    write_slide(tmp_path / "data", read_set_facts(tmp_path / "data"), "late", {"20x": [(0, 0)]}, images=True)
    with pytest.raises(TrainingError, match="data was"):
        autoencoder_training.train(config)
