"""One training on a prepared set, on one worker: batches read ahead, steps, journal, checkpoint, model.

Invariant: the weights after step n are a function of configuration and data; one process, one Ray worker and a resumed
run give the same bytes on a CPU, more workers the same up to rounding. What is learned is a Lesson's business. It does
not know Ray nor command lines.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from engine.core.runtime import choose_device, keep_freed_memory
from engine.training.batches import Sample, ahead
from engine.training.checkpoints import save_json
from engine.training.denoiser.settings import AccumulatedSettings, LearningConfig
from engine.training.gradients import Group, GroupGradients
from engine.training.metrics_log import Journal
from engine.training.optimisation import Conduct, Optimisation, TrainingError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALONE = Group()
_MAY_CHANGE = ("max_skipped", "accumulate", "gradient_checkpointing")
"""Settings that a resume may change: they decide what a step costs, not what is learned."""
_NAMED = 8
"""Patches that a message names at most."""


class Part(Protocol):
    """What one worker computes at once: some samples of a step, read."""

    @property
    def samples(self) -> Sequence[Sample]: ...

    def pinned(self) -> "Part":
        """Return it in page-locked memory, from which copies to a GPU do not wait."""
        ...


P = TypeVar("P", bound=Part)


class Lesson(Protocol[P]):
    """What is learned. `stem` names the checkpoint; `sets` the classes that losses are told apart by (Journal)."""

    stem: str
    sets: dict[str, Sequence[str]]
    keys: dict[str, Any]

    @property
    def networks(self) -> nn.Module: ...

    def draw(self, step: int) -> list[Sample]:
        """Return all samples of a step, a pure function of it."""
        ...

    def read(self, samples: Sequence[Sample], step: int) -> P:
        """Read samples of a step; called from threads. Raises: PreparedError."""
        ...

    def losses(self, call: Callable[..., Any], part: P) -> tuple[Tensor, dict[str, list[int]]]:
        """Return each sample's loss `(B,)` and its classes; `call` is `networks`, or what joins it to a group."""
        ...

    def name(self, sample: Sample) -> str:
        """Return where a sample comes from, for messages."""
        ...

    def write(self, run: Optimisation) -> dict[str, Any]:
        """Write the model, whose networks hold the average now, and return figures for training.json."""
        ...


def keys_of(train: AccumulatedSettings, **more: Any) -> dict[str, Any]:
    """Return what decides the weights; a checkpoint made with other values is not continued."""
    settings = {name: value for name, value in asdict(train).items() if name not in _MAY_CHANGE}
    if train.decay == "constant":
        del settings["steps"]  # longer or shorter, it is the same run
    return {"train": settings, **more}


class Learning(Generic[P]):
    """A lesson on its way, on one worker of a group."""

    def __init__(self, config: LearningConfig, lesson: Lesson[P], train: AccumulatedSettings, group: Group) -> None:
        """Raises: TrainingError when workers cannot share a step evenly or the checkpoint is of another run."""
        if train.batch_size % (group.size * train.accumulate):
            raise TrainingError(
                "train.batch_size must be a multiple of workers times train.accumulate, "
                f"{group.size} * {train.accumulate}; got {train.batch_size}."
            )
        self.config, self.lesson, self.train, self.group = config, lesson, train, group
        self.device, run = torch.device(choose_device(config.device, "device")), Path(config.run)
        keep_freed_memory(self.device.type)
        self.journal = Journal(run, lesson.sets, config.log_every, config.tensorboard, group)
        # The scale of float16's gradients starts at 2**16 and follows them; the others need none.
        scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self._heard: list[tuple[P, Tensor]] = []
        self.optimisation = Optimisation(
            lesson.networks, train, run / f"{lesson.stem}.pt", config.checkpoint_s,
            conduct=Conduct(
                gradients=GroupGradients(lesson.networks, train.accumulate, group, scaler), keys=lesson.keys,
                record=self.journal.record, describe=self.describe, writes=group.rank == 0,
                align=config.log_every,
            ),
        )  # fmt: skip

    def read(self, number: int) -> P:
        """Read this worker's part of that running number."""
        step, part = divmod(number, self.train.accumulate)
        mine = self.lesson.draw(step)[self.group.rank :: self.group.size]
        loaded = self.lesson.read(mine[part :: self.train.accumulate], step)
        return loaded.pinned() if self.device.type == "cuda" else loaded  # type: ignore[return-value]

    def parts(self, first_step: int) -> Generator[P, None, None]:
        """Yield the parts that are left, read ahead."""
        count = self.train.accumulate
        return ahead(self.read, range(first_step * count, self.train.steps * count), self.config.loaders)

    def run(self) -> None:
        """Do the steps that are left and, on the first worker, write the model. Raises: EngineError."""
        first = self.optimisation.step
        if not self.group.agree(first):
            raise TrainingError(
                f"all workers must see one run folder; they found different checkpoints in {self.config.run}. Put it "
                "on storage that all nodes share."
            )
        if self.group.rank == 0:  # not before: a run that is refused leaves the settings of the one that stands there
            save_json(Path(self.config.run) / "config.json", asdict(self.config))
        call = self.group.join(self.lesson.networks)
        stream = self.parts(first)
        self.journal.start(first)

        def loss_of(step: int, share: int) -> tuple[Tensor, dict[str, float]]:
            del step  # parts come in the order in which they are asked for
            loaded = next(stream)
            losses, classes = self.lesson.losses(call, loaded)
            if share == 0:
                self._heard.clear()
            self._heard.append((loaded, losses.detach()))
            self.journal.add(losses, classes)
            return losses.mean(), {}

        with closing(stream), closing(self.journal):
            self.optimisation.run(loss_of)
        if self.group.rank == 0:
            self.export()

    def describe(self, step: int) -> str:
        """Name the patches of a step whose loss is not finite, on whichever worker, or all when each loss is.

        All workers must call it: one that was spared does not know the others' losses.
        """
        bad = torch.zeros(self.train.batch_size, device=self.device)
        for part, losses in self._heard:
            for sample, finite in zip(part.samples, losses.isfinite().tolist(), strict=True):
                bad[sample.number] = not finite
        found = self.group.total(bad).nonzero().flatten().tolist() or range(len(bad))
        samples = self.lesson.draw(step)
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return ", ".join(self.lesson.name(samples[number]) for number in found[:_NAMED]) + more

    def export(self) -> None:
        """Write the averaged weights as the configuration asks. Raises: CheckpointError, CanvasError."""
        run = self.optimisation
        run.average.exchange(self.lesson.networks)
        figures = self.lesson.write(run)
        run.average.exchange(self.lesson.networks)
        log.info("the averaged weights of step %d are in %s", run.step, self.config.output.folder)
        figures |= {"steps": run.step, "skipped": run.skipped, "seconds": round(run.seconds, 1),
                    "config": asdict(self.config), "torch": torch.__version__}  # fmt: skip
        save_json(Path(self.config.run) / "training.json", figures)


def need_checkpoint(config: LearningConfig, stem: str) -> None:
    """Raise TrainingError unless the run has a checkpoint."""
    path = Path(config.run) / f"{stem}.pt"
    if not path.is_file():
        raise TrainingError(
            f"{path} must be there to export from; it is not. Train first, or name the run's folder with --run."
        )
