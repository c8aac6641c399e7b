"""The figures of a run: JSON lines that anything can read, and the same for TensorBoard.

Invariant: a line is the mean over exactly the steps since the line before it, over all workers, and is the same
whether the run was interrupted or not (but for the times): checkpoints are written after whole lines only, and
Optimisation drops the lines after the checkpoint that it goes on from. The last step ends a line too, however short; a
run that is made longer later keeps that line. It does not know networks.
"""

import importlib.util
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.training.gradients import Group
from engine.training.optimisation import LOG, Optimisation, append_line, learning_rate

log = logging.getLogger(__name__)

BANDS = ((0, 100), (100, 250), (250, 500), (500, 750), (750, 1000))
"""Timesteps [from, to) whose losses are told apart: fine detail … layout."""


class Journal:
    """Sums losses by class of sample (each sample has one class per set) and writes their means now and then."""

    def __init__(self, run: Path, sets: dict[str, Sequence[str]], every: int, tensorboard: bool, group: Group) -> None:
        """sets: name of the figure → names of its classes, e.g. "loss_at" → magnifications."""
        self.path, self.sets, self.every, self.group = run / LOG, sets, every, group
        self.board_folder = run / "tensorboard" if tensorboard and group.rank == 0 else None
        self._sums: dict[str, Tensor] = {}
        self._all = torch.zeros(2, dtype=torch.float64)
        self._norms: list[float] = []
        self._board: Any = None
        self._began = time.monotonic()

    def start(self, step: int) -> None:
        """Begin to measure speed, and TensorBoard's file, which drops what it has after `step`."""
        self._began = time.monotonic()
        if self.group.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.board_folder is not None:
            if importlib.util.find_spec("tensorboard") is None:
                log.warning("TensorBoard is not installed: figures are in %s alone. pip install '.[train]' brings it, "
                            "tensorboard: false is silent about it.", self.path)  # fmt: skip
                return
            from torch.utils.tensorboard import SummaryWriter  # an extra of the package

            self._board = SummaryWriter(str(self.board_folder), purge_step=step + 1)

    def add(self, losses: Tensor, classes: dict[str, list[int]]) -> None:
        """Count samples: losses `(B,)`, and each one's class in each set. Those that are not finite do not count."""
        losses = losses.detach().double()
        finite = losses.isfinite()
        values = torch.stack([losses.where(finite, 0), finite.double()])
        self._all = self._all.to(values.device) + values.sum(dim=1)
        for name, numbers in classes.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(2, len(self.sets[name]), dtype=torch.float64, device=values.device)
            self._sums[name].index_add_(1, torch.tensor(numbers, device=values.device), values)

    def record(self, run: Optimisation, figures: dict[str, float]) -> None:
        """Take a step's gradient norm; after `every` steps, and the last, write a line. All workers call it always."""
        self._norms.append(figures["gradient_norm"])
        if run.step % self.every and run.step < run.settings.steps:
            return
        names = [name for name in self.sets if name in self._sums]
        gathered = self.group.total(torch.cat([self._all, *(self._sums[name].flatten() for name in names)]))
        if self.group.rank == 0:
            self._write(run, gathered.cpu(), names)
        self._all.zero_()
        for name in names:
            self._sums[name].zero_()
        self._norms.clear()
        self._began = time.monotonic()

    def _write(self, run: Optimisation, gathered: Tensor, names: list[str]) -> None:
        count = max(float(gathered[1]), 1.0)
        finite = [norm for norm in self._norms if norm < float("inf")]
        line: dict[str, Any] = {
            "stage": run.path.stem, "step": run.step, "seconds": round(run.seconds, 1),
            "lr": learning_rate(run.settings, run.step - 1), "loss": float(gathered[0]) / count,
            "gradient_norm": sum(finite) / max(len(finite), 1),
            "samples_per_s": round(len(self._norms) * run.settings.batch_size / (time.monotonic() - self._began), 3),
            "skipped": run.skipped, "overflows": run.overflows,
        }  # fmt: skip
        at = 2
        for name in names:
            classes = self.sets[name]
            sums, counts = gathered[at : at + 2 * len(classes)].view(2, -1).tolist()
            at += 2 * len(classes)
            line[name] = {c: s / n for c, s, n in zip(classes, sums, counts, strict=True) if n}
            line[f"{name}_samples"] = {c: int(n) for c, n in zip(classes, counts, strict=True)}
        append_line(self.path, line)
        log.info("step %d: loss %.4f, gradient norm %.3f, %.2f samples/s", run.step, line["loss"],
                 line["gradient_norm"], line["samples_per_s"])  # fmt: skip
        if self._board is not None:
            for name, value in _flat(line):
                self._board.add_scalar(name, value, run.step)
            self._board.flush()

    def close(self) -> None:
        """Finish the TensorBoard file."""
        if self._board is not None:
            self._board.close()


def band_of(timestep: int) -> int:
    """Return the number of the band a timestep lies in."""
    return next(i for i, (_, end) in enumerate(BANDS) if timestep < end)


def band_names() -> tuple[str, ...]:
    """Return the bands' names."""
    return tuple(f"t{start:03d}-{end - 1:03d}" for start, end in BANDS)


def _flat(line: dict[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, dict):
            found += [(f"{name}/{inner}", v) for inner, v in value.items()]
        elif name not in ("stage", "step"):
            found.append((name, value))
    return found
