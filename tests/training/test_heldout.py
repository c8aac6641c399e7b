"""Held-out figures: always the same patches and noise, an error that is known for a network that says nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.core.errors import PreparedMismatchError
from engine.training.denoiser import train as denoiser_training
from engine.training.denoiser.settings import HeldoutSettings, JointConfig
from engine.training.denoiser.train import DenoiserLesson, open_source
from engine.training.denoiser.validation import chosen_patches, eps_errors
from engine.training.optimisation import TrainingError
from tests.support.known_run import LEARN, NAMES, tiny_config, write_autoencoder, write_data


@pytest.fixture
def config(tmp_path: Path) -> JointConfig:
    facts = write_autoencoder(tmp_path / "vae")
    write_data(tmp_path / "data", facts)
    write_data(tmp_path / "heldout", facts, without="2.5x")
    heldout = HeldoutSettings(data=str(tmp_path / "heldout"), patches=3, samples=2, stride=500)
    return tiny_config(tmp_path, train=replace(LEARN, steps=2), heldout=heldout)


def test_the_error_of_a_network_that_says_zero_is_the_noises_own(config: JointConfig) -> None:
    lesson = DenoiserLesson(config)
    torch.nn.init.zeros_(lesson.model.unet.conv_out.weight)
    torch.nn.init.zeros_(lesson.model.unet.conv_out.bias)
    source = open_source(lesson.source.data, lesson.model.config)
    errors = eps_errors(lesson.model, source, 3)
    assert list(errors) == list(NAMES)
    assert list(errors.values()) == pytest.approx([1.0] * 4, abs=0.03)
    assert eps_errors(lesson.model, source, 3) == errors
    assert [s.time for s in chosen_patches(source, 0, 4)] == [125, 375, 625, 875]
    assert len({s.patch for s in chosen_patches(source, 0, 4)}) == 4


def test_a_training_measures_and_shows_its_average(config: JointConfig) -> None:
    denoiser_training.train(config)
    figures = (Path(config.run) / "training.json").read_text()
    assert '"heldout_eps_mse"' in figures
    picture = np.asarray(Image.open(Path(config.run) / "samples.png"))
    assert picture.shape == (3 * 256, 4 * 256, 3)


def test_a_set_of_another_autoencoder_is_refused_before_training(config: JointConfig, tmp_path: Path) -> None:
    torch.manual_seed(9)
    facts = replace(write_autoencoder(tmp_path / "vae"), autoencoder_digest="b" * 64)
    other = replace(config.heldout, data=str(write_data(tmp_path / "other", facts)))
    with pytest.raises(PreparedMismatchError, match="autoencoder_digest"):
        DenoiserLesson(replace(config, heldout=other))


def test_the_same_set_is_not_held_out(config: JointConfig) -> None:
    with pytest.raises(TrainingError, match=r"heldout\.data"):
        DenoiserLesson(replace(config, heldout=replace(config.heldout, data=config.data)))
