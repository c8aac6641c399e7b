"""One optimiser run: step, clip, average, count bad losses, checkpoint, log.

Invariant: the weights after step n depend on the settings and the seed only; a killed run that is started again
continues from its last checkpoint and ends with the same bytes (same device and thread count).
It does not know images or latents: a loss is a function of the step number. Source: Kingma & Ba 2015 / Loshchilov 2019.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import EngineError
from engine.training.checkpointing import load_checkpoint, save_checkpoint
from engine.training.settings import OptimiserSettings

log = logging.getLogger(__name__)


class TrainingError(EngineError):
    """Training cannot go on: losses that are not finite, or a checkpoint of another run."""


class LossOfStep(Protocol):
    """The loss of one share of one step; everything random in it is drawn from step and share."""

    def __call__(self, step: int, share: int) -> tuple[Tensor, dict[str, float]]: ...


def step_rng(seed: int, stage: int, step: int) -> np.random.Generator:
    """Return the random numbers of one step: a pure function of its arguments."""
    return np.random.default_rng(np.random.SeedSequence((seed, stage, step)))


def learning_rate(settings: OptimiserSettings, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to 1 % of the peak at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class WeightAverage:
    """Exponential moving average of a module's parameters, with a warm-up so that it follows a young model."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in module.named_parameters():
            self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def exchange(self, module: nn.Module) -> None:
        """Swap the module's parameters with the average; call twice to undo."""
        for name, parameter in module.named_parameters():
            raw = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(raw)


class Optimisation:
    """Run a loss for the steps that are not done yet.

    `path` is the checkpoint; the log beside it gets one JSON line per `log_every` steps.
    """

    def __init__(
        self, module: nn.Module, settings: OptimiserSettings, path: Path, checkpoint_s: float, shares: int = 1
    ) -> None:
        self.module, self.settings, self.path = module, settings, path
        self.checkpoint_s, self.shares, self.log_every = checkpoint_s, shares, 10
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
        self.average = WeightAverage(module, settings.ema)
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        self._resume()

    def _resume(self) -> None:
        if not self.path.exists():
            return
        state = load_checkpoint(self.path)
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, value in self.average.values.items():
            value.copy_(state["average"][name])
        self.step, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]
        log.info("continuing %s at step %d of %d", self.path.stem, self.step, self.settings.steps)

    def save(self) -> None:
        save_checkpoint(
            self.path,
            {"module": self.module.state_dict(), "optimiser": self.optimiser.state_dict(),
             "average": self.average.values, "step": self.step, "skipped": self.skipped,
             "seconds": self.seconds},
        )  # fmt: skip

    def run(self, loss_of: LossOfStep, on_checkpoint: Callable[["Optimisation"], None] | None = None) -> None:
        """Do the steps that are left; `on_checkpoint` is called after every checkpoint."""
        if self.step >= self.settings.steps:
            return
        saved = began = time.monotonic()
        while self.step < self.settings.steps:
            loss, figures = self._gradients(loss_of)
            self._update(loss)
            self.step += 1
            now = time.monotonic()
            self.seconds += now - began
            began = now
            if self.step % self.log_every == 0:
                self._write_log({"loss": float(loss.detach()), **figures})
            if now - saved >= self.checkpoint_s or self.step == self.settings.steps:
                self.save()
                if on_checkpoint is not None:
                    on_checkpoint(self)
                saved = began = time.monotonic()

    def _gradients(self, loss_of: LossOfStep) -> tuple[Tensor, dict[str, float]]:
        """Leave the mean gradient of the shares in the parameters; return the mean loss and the first figures.

        Shares run in threads of one core each: at this size two cores inside one operation gain 1.2, side by side 1.8.
        They are added in order, so the sum does not depend on which finishes first.
        """
        trained = [p for p in self.module.parameters() if p.requires_grad]

        def share(number: int) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
            loss, figures = loss_of(self.step, number)
            return loss.detach(), figures, torch.autograd.grad(loss, trained, allow_unused=True)

        if self.shares == 1:
            parts = [share(0)]
        else:
            with ThreadPoolExecutor(self.shares, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                parts = list(pool.map(share, range(self.shares)))
        for number, parameter in enumerate(trained):
            found = [part[2][number] for part in parts]
            present = [g for g in found if g is not None]
            parameter.grad = sum(present[1:], start=present[0]) / self.shares if present else None
        return torch.stack([part[0] for part in parts]).mean(), parts[0][1]

    def _update(self, loss: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        if not torch.isfinite(loss):
            self._skip()
            return
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip)
        if not torch.isfinite(norm):
            self._skip()
            return
        self.optimiser.step()
        self.average.update(self.module, self.step)

    def _skip(self) -> None:
        self.skipped += 1
        log.warning("step %d: loss or gradient is not finite; skipped", self.step)
        if self.skipped > self.settings.max_skipped:
            raise TrainingError(
                f"at most {self.settings.max_skipped} steps may have a loss or gradient that is not finite; got one "
                f"more at step {self.step} of {self.path}. Lower lr, or set bfloat16: false."
            )

    def _write_log(self, figures: dict[str, float]) -> None:
        line = {"stage": self.path.stem, "step": self.step, "seconds": round(self.seconds, 1),
                "lr": learning_rate(self.settings, self.step - 1), **figures}  # fmt: skip
        with (self.path.parent / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.step % (10 * self.log_every) == 0:
            log.info(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()))
