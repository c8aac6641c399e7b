"""One optimiser run: step, clip, average, count bad losses, checkpoint, log.

Invariant: the weights after step n depend on the settings and the seed only; a killed run that is started again
continues from its last checkpoint and ends with the same bytes (same device and thread count).
It does not know images or latents: a loss is a function of the step number. Source: Kingma & Ba 2015 / Loshchilov 2019.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.errors import EngineError
from engine.core.files import differences
from engine.training.checkpoints import load_checkpoint, save_checkpoint, save_json, write_atomically
from engine.training.gradients import Gradients, Group, GroupGradients, LossOfStep, trained
from engine.training.settings import OptimiserSettings

log = logging.getLogger(__name__)

LOG = "log.jsonl"
"""Name of a run's log beside its checkpoints."""
_FREE_KEYS = ("run", "out", "threads", "device", "checkpoint_s")
"""Of a configuration: where a run computes and where its files go. They change its weights by rounding at most, and
another machine may have to finish it."""


class TrainingError(EngineError):
    """Training cannot go on: losses that are not finite, or a checkpoint of another run."""


def step_rng(seed: int, stage: int, step: int) -> np.random.Generator:
    """Return the random numbers of one step: a pure function of its arguments."""
    return np.random.default_rng(np.random.SeedSequence((seed, stage, step)))


def learning_rate(settings: OptimiserSettings, step: int) -> float:
    """Return the rate of a step: linear warm-up, then constant, or a cosine to 1 % of the peak at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.decay == "constant":
        return settings.lr
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


@dataclass(frozen=True)
class Conduct:
    """How a run is done, apart from its loss; the default is one process that logs to log.jsonl."""

    gradients: Gradients | None = None
    """None: the whole step at once, in this process."""
    keys: dict[str, Any] = field(default_factory=dict)
    """What decides the weights, as JSON values; a checkpoint with other ones is refused."""
    record: Callable[["Optimisation", dict[str, float]], None] | None = None
    """Takes the figures of every step's loss, rate and gradient norm; None writes every tenth to log.jsonl."""
    describe: Callable[[int], str] | None = None
    """Names what a step trains on, for the message about a loss that is not finite."""
    writes: bool = True
    """False for all workers of a group but one: they read checkpoints and write none."""
    align: int = 1
    """Checkpoints are written after multiples of so many steps only."""


class Optimisation:
    """Run a loss for the steps that are not done yet.

    `path` is the checkpoint; the log beside it gets one JSON line per `log_every` steps. Lines after the checkpoint are
    dropped when a run goes on, so a killed run has each line once.
    """

    def __init__(
        self, module: nn.Module, settings: OptimiserSettings, path: Path, checkpoint_s: float,
        conduct: Conduct | None = None,
    ) -> None:  # fmt: skip
        """Raises: TrainingError if the checkpoint in `path` belongs to a run with other keys."""
        self.module, self.settings, self.path = module, settings, path
        self.checkpoint_s, self.log_every = checkpoint_s, 10
        self.conduct = conduct or Conduct()
        self.gradients = self.conduct.gradients or GroupGradients(
            module, 1, Group(), torch.amp.GradScaler(enabled=False)
        )
        self.record = self.conduct.record or Optimisation._write_log
        self.optimiser = torch.optim.AdamW(trained(module), lr=settings.lr, weight_decay=settings.weight_decay)
        self.average = WeightAverage(module, settings.ema)
        self.step, self.skipped, self.overflows, self.seconds = 0, 0, 0, 0.0
        self._resume()

    def _resume(self) -> None:
        if not self.path.exists():
            return
        state = load_checkpoint(self.path)
        check_keys(self.path, state.get("keys", {}), self.conduct.keys)
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.gradients.scaler.load_state_dict(state.get("scaler", {}))
        for name, value in self.average.values.items():
            value.copy_(state["average"][name])
        self.step, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]
        self.overflows = state.get("overflows", 0)
        log.info("continuing %s at step %d of %d", self.path.stem, self.step, self.settings.steps)

    def save(self) -> None:
        """Write the checkpoint. Raises: CanvasError if the disk refuses; the earlier one then still stands."""
        save_checkpoint(
            self.path,
            {"module": self.module.state_dict(), "optimiser": self.optimiser.state_dict(),
             "average": self.average.values, "step": self.step, "skipped": self.skipped,
             "overflows": self.overflows, "seconds": self.seconds, "scaler": self.gradients.scaler.state_dict(),
             "keys": self.conduct.keys},
        )  # fmt: skip

    def run(self, loss_of: LossOfStep, on_checkpoint: Callable[["Optimisation"], None] | None = None) -> None:
        """Do the steps that are left; `on_checkpoint` is called after every checkpoint.

        Raises: TrainingError when too many losses were not finite; CanvasError when the disk refuses a checkpoint.
        """
        if self.conduct.writes:
            drop_lines(self.path.parent / LOG, self.path.stem, self.step)
        if self.step >= self.settings.steps:
            return
        saved = began = time.monotonic()
        while self.step < self.settings.steps:
            loss, figures = self.gradients(loss_of, self.step)
            norm = self._update(loss)
            self.step += 1
            now = time.monotonic()
            self.seconds += now - began
            began = now
            self.record(self, {"loss": float(loss.detach()), "gradient_norm": norm, **figures})
            if not self.conduct.writes:
                continue
            due = now - saved >= self.checkpoint_s and self.step % self.conduct.align == 0
            if due or self.step == self.settings.steps:
                self.save()
                if on_checkpoint is not None:
                    on_checkpoint(self)
                saved = began = time.monotonic()

    def run_averaged(self, loss_of: LossOfStep, measure: Callable[[], object]) -> None:
        """Do the steps that are left, and leave the averaged weights in the module; `measure` sees them, too, whenever
        a checkpoint was written.

        Raises: as `run`.
        """

        def measured(run: "Optimisation") -> None:
            run.average.exchange(run.module)
            measure()
            run.average.exchange(run.module)

        self.run(loss_of, measured)
        # Here and not there: a run that was killed after its last checkpoint must end with them, too.
        self.average.exchange(self.module)

    def _update(self, loss: Tensor) -> float:
        """Take the step unless something is not finite; return the gradient's norm before clipping."""
        scaler = self.gradients.scaler
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip)
        if bool(torch.isfinite(loss)) and bool(torch.isfinite(norm)):
            scaler.step(self.optimiser)
            self.average.update(self.module, self.step)
        elif bool(torch.isfinite(loss)) and scaler.is_enabled() and scaler.get_scale() > 1:
            self.overflows += 1  # the scale was too large for float16, which is how it is found; it halves
        else:
            self._skip()
        scaler.update()
        return float(norm)

    def _skip(self) -> None:
        self.skipped += 1
        batch = "" if self.conduct.describe is None else f" It trains on {self.conduct.describe(self.step)}."
        log.warning("step %d: loss or gradient is not finite; skipped.%s", self.step, batch)
        if self.skipped > self.settings.max_skipped:
            raise TrainingError(
                f"at most {self.settings.max_skipped} steps may have a loss or gradient that is not finite; got one "
                f"more at step {self.step} of {self.path}.{batch} Lower lr, or compute in float32."
            )

    def _write_log(self, figures: dict[str, float]) -> None:
        if self.step % self.log_every:
            return
        line = {"stage": self.path.stem, "step": self.step, "seconds": round(self.seconds, 1),
                "lr": learning_rate(self.settings, self.step - 1), **figures}  # fmt: skip
        append_line(self.path.parent / LOG, line)
        if self.step % (10 * self.log_every) == 0:
            log.info(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a JSON line to a log."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def drop_lines(path: Path, stage: str, step: int) -> None:
    """Drop a stage's lines after `step` from a log, and torn ones; other stages of the run keep theirs."""

    def stays(line: str) -> bool:
        try:
            found = json.loads(line)
        except ValueError:
            return False  # torn by a kill
        return line.endswith("\n") and (found["stage"] != stage or found["step"] <= step)

    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if stays(line)]
    if kept != lines:
        write_atomically(path, lambda partial: partial.write_text("".join(kept)))


def settle(run: Path, values: dict[str, Any], free: Collection[str] = ()) -> None:
    """Note a run's configuration, and what else decides its files, in config.json, before any of them is made.

    `free` are top-level keys that a continued run may change, beside those of every run (_FREE_KEYS).
    Raises: TrainingError if the folder holds a run with other values; its config.json then stays.
    """
    path, now = run / "config.json", json.loads(json.dumps(values))  # as JSON gives it back: tuples are lists

    def deciding(keys: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if key not in (*_FREE_KEYS, *free)}

    if path.exists():
        check_keys(path, deciding(json.loads(path.read_text())), deciding(now))
    save_json(path, now)


def check_keys(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to continue a run with other keys. Raises: TrainingError naming each, old and new, nested ones dotted."""
    if lines := differences(_flat(old), _flat(new)):
        raise TrainingError(
            f"{path} must belong to this run; it was trained otherwise: {lines}. Use the old values to continue it, or "
            "another run folder to begin anew."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by dotted name, as JSON gives them back: tuples are lists. None is as good as not said."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found
