"""A run is a function of its settings and seed, whatever kills it; bad losses are counted, not learned from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.core.errors import CheckpointError
from engine.training.gradients import Group, GroupGradients
from engine.training.optimisation import Conduct, Optimisation, TrainingError, learning_rate, step_rng
from engine.training.settings import OptimiserSettings

SETTINGS = OptimiserSettings(steps=8, batch_size=2, lr=0.01, warmup=2, ema=0.9, max_skipped=1)


class Killed(Exception):
    pass


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 1))


def loss_of(module: nn.Module, killed_at: int | None = None, bad: frozenset[int] = frozenset()):
    def loss(step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        if step == killed_at:
            raise Killed
        images = torch.from_numpy(step_rng(0, 9, step).standard_normal((2, 3, 8, 8))).float()
        scale = float("nan") if step in bad else 1.0
        return module(images).square().mean() * scale, {}

    return loss


def final(path: Path, killed_at: int | None) -> dict[str, Tensor]:
    module = network()
    # checkpoint_s tiny: a checkpoint after every step, so that the kill loses only the step it hits
    optimisation = Optimisation(module, SETTINGS, path, checkpoint_s=1e-9)
    if killed_at is not None:
        with pytest.raises(Killed):
            optimisation.run(loss_of(module, killed_at))
        module = network()
        optimisation = Optimisation(module, SETTINGS, path, checkpoint_s=1e-9)
        assert optimisation.step == killed_at
    optimisation.run(loss_of(module))
    averages = {f"average.{k}": v for k, v in optimisation.average.values.items()}
    return dict(module.state_dict()) | averages


def test_resume_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    straight = final(tmp_path / "a.pt", None)
    resumed = final(tmp_path / "b.pt", killed_at=5)
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_a_killed_run_has_each_line_once_and_other_stages_keep_theirs(tmp_path: Path) -> None:
    """Killed after two lines that no checkpoint knows, the last one torn; the stage before has later steps."""
    settings, log = replace(SETTINGS, steps=40), tmp_path / "log.jsonl"

    def stage(name: str, checkpoint_s: float = 1e9) -> tuple[nn.Module, Optimisation]:
        module = network()
        return module, Optimisation(module, settings, tmp_path / f"{name}.pt", checkpoint_s)

    def logged(name: str) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("stage", "seconds")} for line in lines
                if line["stage"] == name]  # fmt: skip

    module, run = stage("before")
    run.run(loss_of(module))
    module, run = stage("after", checkpoint_s=1e-9)
    with pytest.raises(Killed):
        run.run(loss_of(module, killed_at=12))
    module, run = stage("after")
    with pytest.raises(Killed):
        run.run(loss_of(module, killed_at=35))
    with log.open("a") as file:
        file.write('{"stage": "after", "st')
    module, run = stage("after")
    assert run.step == 12
    run.run(loss_of(module))
    assert [line["step"] for line in logged("after")] == [10, 20, 30, 40]
    assert logged("after") == logged("before")


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = final(tmp_path / "a.pt", None)
    again = final(tmp_path / "a.pt", None)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_loss_that_is_not_finite_is_skipped_then_ends_the_run(tmp_path: Path) -> None:
    module = network()
    optimisation = Optimisation(module, SETTINGS, tmp_path / "a.pt", checkpoint_s=1e9)
    optimisation.run(loss_of(module, bad=frozenset({3})))
    assert optimisation.skipped == 1
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    module = network()
    with pytest.raises(TrainingError, match="at most 1 steps"):
        Optimisation(module, SETTINGS, tmp_path / "b.pt", 1e9).run(loss_of(module, bad=frozenset({3, 5})))


class Slope(nn.Module):
    """One weight whose loss has the slope 4, computed in float16 as a network under autocast is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def loss(self, slope: float = 4.0) -> tuple[Tensor, dict[str, float]]:
        return (slope * self.weight.half()).float().sum(), {}


def test_gradients_are_clipped_before_the_step_and_told_unclipped(tmp_path: Path) -> None:
    module, norms = Slope(), []
    settings = replace(SETTINGS, steps=2, clip=0.5, warmup=0)
    conduct = Conduct(record=lambda _, figures: norms.append(figures["gradient_norm"]))
    run = Optimisation(module, settings, tmp_path / "a.pt", 1e9, conduct=conduct)
    run.run(lambda step, _: module.loss((4.0, 0.25)[step]))
    assert norms == pytest.approx([4, 0.25])
    # AdamW's mean of gradients: of the first a tenth of what clipping left, of the second, below clip, a tenth of all
    assert float(run.optimiser.state[module.weight]["exp_avg"]) == pytest.approx(0.9 * 0.1 * 0.5 + 0.1 * 0.25)


def scaled(module: Slope, path: Path) -> Optimisation:
    gradients = GroupGradients(module, 1, Group(), torch.amp.GradScaler("cpu"))
    settings = replace(SETTINGS, steps=4, warmup=0, max_skipped=0)
    return Optimisation(module, settings, path, 1e-9, Conduct(gradients=gradients))


def test_an_overflow_halves_the_scale_and_is_not_a_skipped_step(tmp_path: Path) -> None:
    """4 · 2**14 is the first power of two beyond float16: the scale falls from 2**16 to 2**13 without a bad loss."""
    module, seen = Slope(), []
    run = scaled(module, tmp_path / "a.pt")

    def loss_of(step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        seen.append((run.gradients.scaler.get_scale(), float(module.weight.detach())))
        return module.loss()

    run.run(loss_of)
    assert [scale for scale, _ in seen] == [2.0**16, 2.0**15, 2.0**14, 2.0**13]
    assert [weight for _, weight in seen] == [1.0] * 4
    assert float(module.weight.detach()) < 1
    assert (run.overflows, run.skipped) == (3, 0)
    # the gradient is unscaled before it is clipped to 1
    assert float(run.optimiser.state[module.weight]["exp_avg"]) == pytest.approx(0.1)
    again = scaled(Slope(), tmp_path / "a.pt")
    assert (again.overflows, again.gradients.scaler.get_scale()) == (3, 2.0**13)


def test_a_bad_loss_is_no_overflow_though_the_loss_is_scaled(tmp_path: Path) -> None:
    module = Slope()
    run = scaled(module, tmp_path / "a.pt")
    with pytest.raises(TrainingError, match="at most 0 steps"):
        run.run(lambda _, __: module.loss(float("nan")))
    assert (run.overflows, run.skipped) == (0, 1)


def test_rate_warms_up_and_decays_to_one_percent() -> None:
    rates = [learning_rate(SETTINGS, step) for step in range(9)]
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == pytest.approx(0.01)
    assert rates[8] == pytest.approx(0.0001)


def test_exchanging_the_average_twice_changes_nothing(tmp_path: Path) -> None:
    module = network()
    optimisation = Optimisation(module, SETTINGS, tmp_path / "a.pt", 1e9)
    optimisation.run(loss_of(module))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    optimisation.average.exchange(module)
    assert any(not torch.equal(v, before[k]) for k, v in module.state_dict().items())
    optimisation.average.exchange(module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        Optimisation(network(), SETTINGS, tmp_path / "a.pt", 1e9)


def test_parts_average_to_the_gradient_of_the_whole() -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for parts in (1, 2):
        module = network()
        gradients = GroupGradients(module, parts, Group(), torch.amp.GradScaler(enabled=False))

        def loss(step: int, part: int, module: nn.Module = module, parts: int = parts):
            return module(images[part::parts]).square().mean(), {}

        gradients(loss, 0)
        results.append([p.grad.clone() for p in module.parameters()])
    for whole, halves in zip(*results, strict=True):
        assert torch.allclose(whole, halves, atol=1e-6)
