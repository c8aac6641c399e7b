"""A training on a prepared set is a function of its configuration, whatever kills it, and says what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_run import LEARN, NAMES, NETWORKS, tiny_config, write_autoencoder, write_data
from torch import Tensor

from engine.errors import CanvasError, CheckpointError, PreparedError, PreparedMismatchError
from engine.magnification import MagnificationScale
from engine.model.zoomldm import ZoomLDM
from engine.training import joint
from engine.training.joint import DenoiserLesson
from engine.training.joint_settings import InitialSettings, JointConfig, OutputSettings
from engine.training.learning import ALONE, Learning
from engine.training.loop import TrainingError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    write_data(folder / "data", write_autoencoder(folder / "vae"))
    return folder


class Killed(BaseException):
    pass


def learning(config: JointConfig) -> Learning:
    torch.set_num_threads(1)
    return Learning(config, DenoiserLesson(config), config.train, ALONE)


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
    joint.train(config)
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
        file.write('{"step": 5, "loss": 0.0}\n{"step": 6, "lo')  # of a later kill, the last line torn
    assert learning(config).optimisation.step == 4
    joint.train(config)
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


def test_the_ldm_layout_holds_average_and_raw_weights(root: Path, straight: JointConfig) -> None:
    config = replace(straight, output=replace(straight.output, ldm=str(root / "ldm")))
    joint.export(config)
    ours, theirs = ZoomLDM.from_pretrained(straight.output.folder), ZoomLDM.from_pretrained(root / "ldm")
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    raw = ZoomLDM.from_pretrained(root / "ldm", weights="raw").unet.state_dict()
    trained = torch.load(root / "straight" / "denoiser.pt", weights_only=True)["module"]
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
    assert one.draw(3) == one.draw(3)
    assert one.draw(3) != one.draw(4)


def test_half_precision_with_a_scaled_loss_learns(root: Path) -> None:
    config = tiny_config(root, "half", replace(LEARN, steps=2), precision="float16")
    joint.train(config)
    state = torch.load(root / "half" / "denoiser.pt", weights_only=True)
    assert state["scaler"]["scale"] > 0
    assert all(bool(v.isfinite().all()) for v in state["module"].values())


# What is refused


def test_another_architecture_is_refused_by_name(root: Path, straight: JointConfig) -> None:
    wider = replace(straight, model=replace(NETWORKS, summarizer_mlp=32))
    with pytest.raises(TrainingError, match=r"model\.conditioner\.mlp was 64, now 32"):
        joint.train(wider)
    with pytest.raises(TrainingError, match=r"seed was 0, now 1"):
        joint.train(replace(straight, seed=1))


def test_more_steps_continue_a_constant_rate(root: Path, straight: JointConfig) -> None:
    assert learning(replace(straight, train=replace(LEARN, steps=8))).optimisation.step == 6


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
        ZoomLDM(joint.network_config(NETWORKS)).save_pretrained(root / "other")
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
    joint.train(config)
    model = ZoomLDM.from_pretrained(config.output.folder)
    assert model.config.scale == MagnificationScale(("20x",), 0.5)
    with pytest.raises(PreparedMismatchError, match="trained at the set's base"):
        DenoiserLesson(replace(config, model=replace(single, magnifications=("5x",))))


def test_the_ldm_layout_is_refused_before_training(root: Path) -> None:
    output = OutputSettings(folder=str(root / "no"), ldm=str(root / "no_ldm"))
    config = tiny_config(root, "no", model=replace(NETWORKS, unet_channels=(32, 64), groups=16), output=output)
    with pytest.raises(CheckpointError, match="norm_num_groups"):
        joint.train(config)
