"""What a training on a prepared set refuses, and how it says so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.errors import CanvasError, CheckpointError, PreparedError, PreparedMismatchError
from engine.core.units import MagnificationScale
from engine.model.zoomldm import ZoomLDM
from engine.training.denoiser import train as denoiser_training
from engine.training.denoiser.settings import InitialSettings, JointConfig, OutputSettings
from engine.training.denoiser.train import DenoiserLesson
from engine.training.optimisation import TrainingError
from tests.support.known_run import (
    LDM_NETWORKS,
    LEARN,
    NAMES,
    NETWORKS,
    learning,
    tiny_config,
    write_autoencoder,
    write_data,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    write_data(folder / "data", write_autoencoder(folder / "vae"))
    return folder


@pytest.fixture(scope="module")
def straight(root: Path) -> JointConfig:
    config = tiny_config(root, "straight", replace(LEARN, steps=2))
    denoiser_training.train(config)
    return config


def test_another_architecture_is_refused_by_name(root: Path, straight: JointConfig) -> None:
    wider = replace(straight, model=replace(NETWORKS, summarizer_mlp=32))
    with pytest.raises(TrainingError, match=r"model\.conditioner\.mlp was 64, now 32"):
        denoiser_training.train(wider)
    with pytest.raises(TrainingError, match=r"seed was 0, now 1"):
        denoiser_training.train(replace(straight, seed=1))
    assert json.loads((root / "straight" / "config.json").read_text())["seed"] == 0  # the values to go back to


def test_more_steps_continue_a_constant_rate(root: Path, straight: JointConfig) -> None:
    assert learning(replace(straight, train=replace(LEARN, steps=8))).optimisation.step == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": replace(NETWORKS, encoder="uni")}, "encoder is 'demo', not 'uni'"),
        ({"model": replace(NETWORKS, magnifications=NAMES[:3])}, "magnifications is"),
        ({"initial": InitialSettings(vae="other")}, "autoencoder_digest"),
    ],
)
def test_a_set_prepared_for_another_model_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], word: str
) -> None:
    monkeypatch.chdir(root)
    if not (root / "other").exists():
        torch.manual_seed(8)
        ZoomLDM(denoiser_training.network_config(NETWORKS)).save_pretrained(root / "other")
    with pytest.raises(PreparedMismatchError, match=word):
        DenoiserLesson(tiny_config(root, "refused", **change))


def test_an_empty_magnification_is_refused_unless_its_weight_is_zero(root: Path) -> None:
    if not (root / "gap").exists():
        write_data(root / "gap", write_autoencoder(root / "vae"), without="5x")
    config = tiny_config(root, "gap_run", data=str(root / "gap"))
    with pytest.raises(PreparedError, match="must have patches at 5x"):
        DenoiserLesson(config)
    DenoiserLesson(replace(config, train=replace(LEARN, magnification_weights=(1, 1, 0, 1))))
    with pytest.raises(TrainingError, match="must be 4 numbers"):
        DenoiserLesson(replace(config, train=replace(LEARN, magnification_weights=(1, 1))))


def test_a_latent_with_nan_and_a_missing_shard_are_named(root: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", write_autoencoder(tmp_path / "vae"))
    path = data / "slides" / "left" / "5x" / "latents.npy"
    latents = np.load(path)
    latents[:] = np.nan
    np.save(path, latents)
    only = replace(LEARN, magnification_weights=(0, 0, 1, 0), batch_size=8)
    with pytest.raises(PreparedError, match=r"latent must be finite; that of patch \d in .*left/5x"):
        learning(tiny_config(tmp_path, train=only)).run()
    path.unlink()
    with pytest.raises(PreparedError, match=r"latents\.npy must be there"):
        learning(tiny_config(tmp_path, train=only))


def test_a_loss_that_is_not_finite_names_its_patches_and_ends_the_run(root: Path) -> None:
    one = learning(tiny_config(root, "nan"))
    losses = one.lesson.losses

    def spoilt(call: Any, part: Any) -> Any:
        found, classes = losses(call, part)
        bad = torch.tensor([sample.number == 1 for sample in part.samples])
        return torch.where(bad, torch.nan, found), classes

    one.lesson.losses = spoilt  # type: ignore[method-assign]
    culprit = one.lesson.name(one.lesson.draw(1)[1])
    with pytest.raises(TrainingError, match="at most 1 steps") as stop:
        one.run()
    assert culprit in str(stop.value)
    assert str(stop.value).count(" patch ") == 1
    assert all(bool(p.isfinite().all()) for p in one.lesson.networks.parameters())


def test_a_full_disk_leaves_the_checkpoint_that_was(root: Path, tmp_path: Path) -> None:
    one = learning(tiny_config(root, "full", replace(LEARN, steps=2)))
    one.run()
    path = root / "full" / "denoiser.pt"
    before = path.read_bytes()
    path.with_name("denoiser.pt.partial").symlink_to("/dev/full")
    with pytest.raises(CanvasError, match=r"denoiser\.pt cannot be written: the disk"):
        one.optimisation.save()
    assert path.read_bytes() == before


def test_an_initial_checkpoint_that_does_not_fit_names_its_keys(root: Path) -> None:
    wide = replace(NETWORKS, unet_channels=(64, 64))
    initial = InitialSettings(vae=str(root / "vae"), unet=str(root / "vae"))
    with pytest.raises(CheckpointError, match=r"wrong shape: conv_in\.weight must be \(64, 3, 3, 3\)"):
        DenoiserLesson(tiny_config(root, "unfit", model=wide, initial=initial))


def test_a_batch_that_workers_cannot_share_is_refused(root: Path) -> None:
    with pytest.raises(TrainingError, match=r"multiple of workers times train\.accumulate, 1 \* 3"):
        learning(tiny_config(root, "uneven", replace(LEARN, accumulate=3)))


def test_a_token_model_learns_from_the_base_alone(root: Path) -> None:
    single = replace(NETWORKS, conditioner="token", magnifications=("20x",))
    config = tiny_config(root, "token", replace(LEARN, steps=2), model=single)
    denoiser_training.train(config)
    model = ZoomLDM.from_pretrained(config.output.folder)
    assert model.config.scale == MagnificationScale(("20x",), 0.5)
    with pytest.raises(PreparedMismatchError, match="trained at the set's base"):
        DenoiserLesson(replace(config, model=replace(single, magnifications=("5x",))))


def test_the_ldm_layout_is_refused_before_training(root: Path) -> None:
    output = OutputSettings(folder=str(root / "no"), ldm=str(root / "no_ldm"))
    config = tiny_config(root, "no", model=replace(LDM_NETWORKS, unet_channels=(32, 64), groups=16), output=output)
    with pytest.raises(CheckpointError, match="norm_num_groups"):
        denoiser_training.train(config)


def test_the_ldm_layout_is_refused_to_a_whole_model_that_it_cannot_say(root: Path) -> None:
    """As to the demo, which predicts v: its configuration says nothing of that."""
    torch.manual_seed(7)
    whole = root / "v_prediction"
    mute = replace(LDM_NETWORKS, prediction_type="v_prediction")
    ZoomLDM(denoiser_training.network_config(mute)).save_pretrained(whole)
    output = OutputSettings(folder=str(root / "never"), ldm=str(root / "never_ldm"))
    config = tiny_config(root, "never", initial=InitialSettings(model=str(whole)), output=output)
    with pytest.raises(CheckpointError, match="no words for prediction_type='v_prediction'"):
        denoiser_training.train(config)
    assert not (root / "never" / "denoiser.pt").exists()
