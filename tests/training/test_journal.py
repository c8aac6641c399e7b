"""Every line is the mean over exactly the steps since the line before it, also where a run ends between two."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.training import metrics_log
from engine.training.gradients import Group
from engine.training.metrics_log import Journal
from engine.training.optimisation import Conduct, Optimisation
from engine.training.settings import OptimiserSettings


def logged(run: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Do the steps that are left, each of one second and with the losses (step, step + 2); return all lines."""
    seconds, module = [0.0], nn.Linear(1, 1)
    monkeypatch.setattr(metrics_log, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    figures = Journal(run, {"loss_at": ("20x",)}, every=3, tensorboard=False, group=Group())
    settings = OptimiserSettings(steps=steps, batch_size=2, warmup=0, decay="constant")
    conduct = Conduct(record=figures.record, align=3)
    optimisation = Optimisation(module, settings, run / "denoiser.pt", 1e-9, conduct=conduct)

    def loss_of(step: int, _: int) -> tuple[Tensor, dict[str, float]]:
        losses = torch.tensor([step, step + 2]) + 0 * module.weight.sum()
        figures.add(losses, {"loss_at": [0, 0]})
        seconds[0] += 1
        return losses.mean(), {}

    figures.start(optimisation.step)
    optimisation.run(loss_of)
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_that_ends_between_two_lines_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(tmp_path, 5, monkeypatch)
    assert [line["step"] for line in lines] == [3, 5]
    longer = logged(tmp_path, 9, monkeypatch)
    assert longer[:2] == lines
    assert [line["step"] for line in longer] == [3, 5, 6, 9]
    assert [line["loss_at_samples"]["20x"] for line in longer] == [6, 4, 2, 6]
    assert [line["loss"] for line in longer] == [2.0, 4.5, 6.0, 8.0]
    assert [line["samples_per_s"] for line in longer] == [2.0] * 4
