"""A training on a prepared set is a function of its configuration, whatever kills it, and says what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.model.zoomldm import ZoomLDM
from engine.training.denoiser import train as denoiser_training
from engine.training.denoiser.settings import JointConfig
from engine.training.denoiser.train import DenoiserLesson
from engine.training.trainer import Learning
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
    folder = tmp_path_factory.mktemp("joint")
    write_data(folder / "data", write_autoencoder(folder / "vae"))
    return folder


class Killed(BaseException):
    pass


def weights_of(run: str, root: Path) -> dict[str, Tensor]:
    state = torch.load(root / run / "denoiser.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, m in state["optimiser"]["state"].items() for k, v in m.items()}
    return state["module"] | {f"average.{k}": v for k, v in state["average"].items()} | moments


def curve(run: str, root: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (root / run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_s")} for line in lines]


@pytest.fixture(scope="module")
def straight(root: Path) -> JointConfig:
    config = tiny_config(root, "straight")
    denoiser_training.train(config)
    return config


def test_a_killed_run_ends_as_an_undisturbed_one(root: Path, straight: JointConfig) -> None:
    """Killed after a line of the log that no checkpoint knows: weights, average, moments and curve are the same."""
    del straight
    config = tiny_config(root, "killed")
    once = learning(config)
    read = once.lesson.read

    def read_until(samples: Any, step: int) -> Any:
        if step == 5:
            raise Killed
        return read(samples, step)

    once.lesson.read = read_until  # type: ignore[method-assign]
    with pytest.raises(Killed):
        once.run()
    with (root / "killed" / "log.jsonl").open("a") as file:
        file.write(
            '{"stage": "denoiser", "step": 5, "loss": 0.0}\n{"stage": "denoiser", "step": 6, "lo'
        )  # of a later kill, the last line torn
    assert learning(config).optimisation.step == 4
    denoiser_training.train(config)
    expected, got = weights_of("straight", root), weights_of("killed", root)
    assert expected.keys() == got.keys()
    assert all(torch.equal(v, got[k]) for k, v in expected.items())
    assert curve("killed", root) == curve("straight", root)


def test_what_is_written_are_the_averaged_weights(root: Path, straight: JointConfig) -> None:
    model = ZoomLDM.from_pretrained(straight.output.folder)
    averages = torch.load(root / "straight" / "denoiser.pt", weights_only=True)["average"]
    raw = torch.load(root / "straight" / "denoiser.pt", weights_only=True)["module"]
    for name, value in averages.items():
        part, _, inner = name.partition(".")
        assert torch.equal(getattr(model, part).state_dict()[inner], value), name
    assert any(not torch.equal(raw[k], v) for k, v in averages.items())
    source = ZoomLDM.from_pretrained(root / "vae")
    assert all(torch.equal(v, source.vae.state_dict()[k]) for k, v in model.vae.state_dict().items())


def test_the_log_tells_magnifications_and_bands_apart(root: Path, straight: JointConfig) -> None:
    lines = curve("straight", root)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert sum(line["loss_at_samples"].values()) == sum(line["loss_t_samples"].values()) == 8
        assert set(line["loss_at_samples"]) == set(NAMES)
        mean = sum(line["loss_at"][k] * line["loss_at_samples"][k] for k in line["loss_at"]) / 8
        assert mean == pytest.approx(line["loss"])


def test_the_ldm_layout_holds_average_and_raw_weights(tmp_path: Path) -> None:
    write_data(tmp_path / "data", write_autoencoder(tmp_path / "vae", LDM_NETWORKS))
    config = tiny_config(tmp_path, "run", replace(LEARN, steps=2), model=LDM_NETWORKS)
    denoiser_training.train(config)
    denoiser_training.export(replace(config, output=replace(config.output, ldm=str(tmp_path / "ldm"))))
    ours, theirs = ZoomLDM.from_pretrained(config.output.folder), ZoomLDM.from_pretrained(tmp_path / "ldm")
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    raw = ZoomLDM.from_pretrained(tmp_path / "ldm", weights="raw").unet.state_dict()
    trained = torch.load(tmp_path / "run" / "denoiser.pt", weights_only=True)["module"]
    assert all(torch.equal(v, trained[f"unet.{k}"]) for k, v in raw.items())


def test_parts_of_a_step_have_its_gradient(root: Path) -> None:
    found = []
    for parts in (1, 2):
        config = tiny_config(root, f"parts{parts}", replace(LEARN, accumulate=parts, drop_condition=0.5))
        one = learning(config)
        stream = one.parts(0)

        def loss_of(step: int, part: int, one: Learning = one, stream: Any = stream) -> tuple[Tensor, dict[str, float]]:
            return one.lesson.losses(one.lesson.networks, next(stream))[0].mean(), {}

        one.optimisation.gradients(loss_of, 0)
        found.append([p.grad.clone() for p in one.lesson.networks.parameters()])
        stream.close()
    for whole, halves in zip(*found, strict=True):
        assert torch.allclose(whole, halves, atol=1e-6)


def test_recomputed_activations_change_no_gradient(root: Path) -> None:
    found = []
    for again in (False, True):
        one = learning(tiny_config(root, "recomputed", replace(LEARN, gradient_checkpointing=again)))
        part = next(one.parts(0))
        one.lesson.losses(one.lesson.networks, part)[0].mean().backward()
        found.append([p.grad.clone() for p in one.lesson.networks.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_a_dropped_condition_is_zeros_after_the_summarizer(root: Path) -> None:
    one = learning(tiny_config(root, "dropped", replace(LEARN, drop_condition=1.0, batch_size=2)))
    part, networks = next(one.parts(0)), one.lesson.networks
    x_t, times = part.noise, part.times
    got = networks(x_t, times, part.cells, part.levels, part.dropped)
    null = networks.unet(x_t, times, encoder_hidden_states=torch.zeros(2, 65, 32)).sample
    assert torch.allclose(got, null, atol=1e-6)
    assert not torch.allclose(got, networks(x_t, times, part.cells, part.levels, ~part.dropped), atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_of_what_the_network_predicts(root: Path, kind: str) -> None:
    one = learning(tiny_config(root, f"kind_{kind}", model=replace(NETWORKS, prediction_type=kind)))
    part = next(one.parts(0))
    wanted = {}
    alpha_bar = one.lesson.model.alphas_cumprod[part.times].float()[:, None, None, None]
    wanted["epsilon"] = part.noise
    wanted["v_prediction"] = alpha_bar.sqrt() * part.noise - (1 - alpha_bar).sqrt() * part.x0
    x_t = alpha_bar.sqrt() * part.x0 + (1 - alpha_bar).sqrt() * part.noise
    zeros = one.lesson.losses(lambda x, *_: torch.zeros_like(x), part)[0]
    assert torch.allclose(zeros, wanted[kind].square().mean(dim=(1, 2, 3)), rtol=1e-5)
    right = one.lesson.losses(lambda x, *_: wanted[kind] + 0 * (x - x_t), part)[0]
    assert float(right.max()) < 1e-8


def test_draws_follow_the_weights_and_not_the_numbers_of_patches(root: Path) -> None:
    weights = (0.0, 1.0, 0.0, 3.0)
    one = DenoiserLesson(tiny_config(root, "draws", replace(LEARN, batch_size=64, magnification_weights=weights)))
    drawn = [sample for step in range(40) for sample in one.draw(step)]
    shares = np.bincount([sample.level for sample in drawn], minlength=4) / len(drawn)
    assert shares == pytest.approx([0, 0.25, 0, 0.75], abs=0.03)
    assert np.mean([sample.dropped for sample in drawn]) == pytest.approx(0.1, abs=0.02)
    strata = [sorted(s.time for s in one.draw(step)) for step in range(40)]
    assert all(abs(time - (number + 0.5) * 1000 / 64) <= 9 for times in strata for number, time in enumerate(times))
    assert one.draw(3) == one.draw(3)
    assert one.draw(3) != one.draw(4)


def test_half_precision_with_a_scaled_loss_learns(root: Path) -> None:
    config = tiny_config(root, "half", replace(LEARN, steps=2), precision="float16")
    denoiser_training.train(config)
    state = torch.load(root / "half" / "denoiser.pt", weights_only=True)
    assert state["scaler"]["scale"] > 0
    assert all(bool(v.isfinite().all()) for v in state["module"].values())
