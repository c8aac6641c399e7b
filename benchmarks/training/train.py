"""What the trainer costs beside the network: samples/s of a whole training against a bare loop of the same step.

    python -m benchmarks.training.train --folder runs/train_speed

The trainer reads patches from disk, draws noise and keeps its journal; the bare loop has one batch in memory and
does forward, backward, clipping, AdamW and the weight average on the same network. They take turns of a few steps, so
that a busy machine slows both.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.support.phantom_set import write_phantom_set
from benchmarks.training.overfit import config_of
from engine.training.denoiser.settings import JointConfig, JointSettings
from engine.training.denoiser.train import DenoiserLesson
from engine.training.optimisation import WeightAverage
from engine.training.trainer import ALONE, Learning


class Trainer:
    """The real thing, some steps at a time."""

    def __init__(self, config: JointConfig, steps: int) -> None:
        self.config, self.steps, self.done = config, steps, 0

    def turn(self) -> float:
        """Go on for some steps from the checkpoint; return the seconds they took, start-up left out."""
        self.done += self.steps
        train = replace(self.config.train, steps=self.done, decay="constant")
        config = replace(self.config, train=train)
        learning = Learning(config, DenoiserLesson(config), train, ALONE)
        learning.export = lambda: None  # type: ignore[method-assign]  # the end of a run is not its speed
        learning.run()
        return learning.optimisation.seconds


class BareStep:
    """An optimiser step as the trainer does it, without a trainer: gradient, clipping, AdamW, weight average."""

    def __init__(self, networks: nn.Module, train: JointSettings) -> None:
        self.networks, self.train, self.done = networks, train, 0
        self.optimiser = torch.optim.AdamW(networks.parameters(), lr=1e-3)
        self.average = WeightAverage(networks, train.ema)

    def __call__(self, loss_of: Callable[[], Tensor]) -> None:
        """Take a step on a mean loss; returns when the device has its value."""
        self.networks.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(self.networks.parameters(), self.train.clip)
        self.optimiser.step()
        self.average.update(self.networks, self.done)
        self.done += 1
        float(loss.detach())


class Bare:
    """The same step on one batch in memory."""

    def __init__(self, config: JointConfig, steps: int) -> None:
        self.steps = steps
        self.lesson = DenoiserLesson(config)
        self.part = self.lesson.read(self.lesson.draw(0), 0)
        self.step = BareStep(self.lesson.networks, config.train)

    def turn(self) -> float:
        """Do some steps; return the seconds they took."""
        began = time.monotonic()
        for _ in range(self.steps):
            self.step(lambda: self.lesson.losses(self.lesson.networks, self.part)[0].mean())
        return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/train_speed"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of a turn")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    shutil.rmtree(options.folder / "run", ignore_errors=True)
    if not (options.folder / "data").exists():
        write_phantom_set(options.folder / "data", 8, 8)
    config = replace(config_of(options.folder, options.steps, options.threads), log_every=options.steps)
    torch.set_num_threads(options.threads)
    trainer, bare = Trainer(config, options.steps), Bare(config, options.steps)
    samples = options.steps * config.train.batch_size
    taken: dict[str, list[float]] = {"trainer": [], "bare": []}
    before = 0.0
    for turn in range(options.turns + 1):
        total = trainer.turn()
        pair = {"trainer": total - before, "bare": bare.turn()}
        before = total
        if turn:  # the first warms up
            for name, seconds in pair.items():
                taken[name].append(seconds)
    speeds = {name: samples / np.array(found) for name, found in taken.items()}
    ratios = speeds["trainer"] / speeds["bare"]
    print(json.dumps({
        "trainer_samples_per_s": round(float(np.median(speeds["trainer"])), 2),
        "bare_samples_per_s": round(float(np.median(speeds["bare"])), 2),
        "ratio_median": round(float(np.median(ratios)), 3), "ratios": [round(float(r), 3) for r in ratios],
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
