"""Two workers do what one does: the same gradient of the same global batch, the same curve, also after a resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from engine.training.denoiser import train as denoiser_training
from engine.training.denoiser.settings import JointConfig
from engine.training.denoiser.train import DenoiserLesson
from engine.training.gradients import Group, ProcessGroup
from engine.training.optimisation import TrainingError
from engine.training.trainer import ALONE, Learning
from tests.support.known_run import LEARN, tiny_config, write_autoencoder, write_data

HALVES = replace(LEARN, steps=4, drop_condition=0.5, accumulate=1)


def first_gradient(config: JointConfig, group: Group) -> list[Tensor]:
    """Return the gradient of the first step."""
    torch.set_num_threads(1)
    learning = Learning(config, DenoiserLesson(config), config.train, group)
    call, stream = group.join(learning.lesson.networks), learning.parts(0)
    learning.optimisation.gradients(lambda _, __: (learning.lesson.losses(call, next(stream))[0].mean(), {}), 0)
    stream.close()
    return [parameter.grad.clone() for parameter in learning.lesson.networks.parameters()]


def as_worker(rank: int, root: Path, accumulate: int) -> None:
    """Compute a gradient, then go on with the run that one worker began; called in a process of its own."""
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    config = tiny_config(root, "two", replace(HALVES, accumulate=accumulate))
    gradient = first_gradient(replace(config, run=str(root / "gradient")), ProcessGroup())
    torch.save(gradient, root / f"gradient{rank}.pt")
    denoiser_training.train(config, ProcessGroup())
    (root / f"named{rank}.txt").write_text(named_in_a_bad_step(replace(config, run=str(root / "bad"))))
    dist.destroy_process_group()


def named_in_a_bad_step(config: JointConfig) -> str:
    """Return what the error says of a step of which patch 3 alone, the second worker's, has a bad loss."""
    lesson = DenoiserLesson(config)
    losses = lesson.losses

    def spoilt(call: Any, part: Any) -> Any:
        found, classes = losses(call, part)
        return found / torch.tensor([float(sample.number != 3) for sample in part.samples]), classes

    lesson.losses = spoilt  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as stop:
        Learning(config, lesson, replace(config.train, max_skipped=0), ProcessGroup()).run()
    return str(stop.value)


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_workers_do_what_one_does(tmp_path: Path) -> None:
    write_data(tmp_path / "data", write_autoencoder(tmp_path / "vae"))
    config = tiny_config(tmp_path, "one", HALVES)
    alone = first_gradient(replace(config, run=str(tmp_path / "gradient")), ALONE)
    denoiser_training.train(config)
    denoiser_training.train(tiny_config(tmp_path, "two", replace(HALVES, steps=2)))  # one worker begins, two go on
    torch.multiprocessing.spawn(as_worker, (tmp_path, 2), nprocs=2)
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"gradient{rank}.pt", weights_only=True)
        total = float(torch.cat([one.flatten() for one in alone]).norm())
        for one, two in zip(alone, shared, strict=True):  # some are zero but for rounding, such as a key's bias
            assert float((one - two).norm()) <= 1e-5 * max(float(one.norm()), 1e-2 * total)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [sum(line["loss_at_samples"].values()) for line in lines] == [8, 8]
    lesson = DenoiserLesson(config)
    culprit = lesson.name(lesson.draw(0)[3])
    for rank in (0, 1):  # also the worker that computed others
        said = (tmp_path / f"named{rank}.txt").read_text()
        assert culprit in said
        assert said.count(" patch ") == 1
