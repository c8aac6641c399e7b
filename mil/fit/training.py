"""Train one model of bags: epochs of sampled instances, cosine rate, early stopping on validation AUROC.

Invariant: the weights depend on the settings, the seed and the bags; with `deterministic`, to the last byte (same
device kind, thread count and library versions). It does not know patients' files, folds or reports.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from torch import Tensor

from engine.training.optimisation import TrainingError, learning_rate
from engine.training.settings import OptimiserSettings
from mil.data.dataset import Bag, Batch, batches, epoch_order, sample_rows
from mil.fit.metrics import FIGURES, Predictions
from mil.models.contract import BagModel, FeatureScale

Precision = Literal["float32", "bfloat16", "float16"]
Scaling = Literal["standardize", "whiten", "none"]
SCALE_INSTANCES = 512
"""Instances per bag that the mean and deviation of features are taken from."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained."""

    epochs: int = 60
    """Most epochs; the cosine ends here."""
    patience: int = 12
    """Epochs without a better validation AUROC (of equals, a lower loss) before training stops."""
    batch_size: int = 4
    """Bags per step, padded to the longest."""
    instances: int | None = 4096
    """Most instances of a bag per epoch, drawn anew each time; None takes all. Validation and tests take all."""
    lr: float = 2e-4
    """Peak learning rate of AdamW, after two epochs of warm-up."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    clip: float = 5.0
    """Largest gradient norm."""
    class_weight: Literal["balanced", "none"] = "balanced"
    """balanced weighs all classes alike."""
    scaling: Scaling = "standardize"
    """standardize: by the mean and deviation of the training bags. whiten: decorrelate the features of each scale as
    well, so that faint directions count as much as strong ones; costs a D x D product per tile."""
    precision: Precision = "float32"
    """Arithmetic of the network's products; bfloat16 and float16 are mixed precision."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms: equal runs give equal bytes."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size", "clip", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"training.{name} must be positive; got {getattr(self, name)}.")
        if self.instances is not None and self.instances < 1:
            raise ValueError(f"training.instances must be at least 1, or null for all; got {self.instances}.")
        if self.weight_decay < 0:
            raise ValueError(f"training.weight_decay must be 0 or more; got {self.weight_decay}.")


@dataclass(frozen=True)
class Part:
    """Bags with labels; `groups` are the patients that bags are averaged over in validation."""

    bags: Sequence[Bag]
    labels: NDArray[np.int64]
    groups: NDArray

    def by_group(self, values: NDArray[np.floating]) -> tuple[NDArray, NDArray[np.float64], NDArray[np.int64]]:
        """Return groups, the mean of their bags' values ((n,) or (n, classes)), and their labels."""
        names, owner = np.unique(self.groups, return_inverse=True)
        columns = [np.bincount(owner, weights=column) / np.bincount(owner) for column in np.atleast_2d(values.T)]
        mean = columns[0] if values.ndim == 1 else np.stack(columns, axis=1)
        labels = np.zeros(len(names), np.int64)
        labels[owner] = self.labels
        return names, mean, labels


@dataclass(frozen=True)
class EpochRecord:
    """One line of a fold's history."""

    epoch: int
    lr: float
    train_loss: float
    validation_loss: float
    validation_auroc: float


@contextlib.contextmanager
def reproducible(seed: int, deterministic: bool) -> Iterator[None]:
    """Seed torch inside and give its state back afterwards; `deterministic` forbids operations that are not."""
    before = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(deterministic or before)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def fit_scale(features: FeatureScale, bags: Sequence[Bag], seed: int) -> None:
    """Give a scaling the mean and (co)variance of the training bags' features; each bag counts the same."""
    widths = features.widths if features.whiten else ()
    ends = np.cumsum(widths)
    total = square = np.zeros(sum(features.widths))
    products = [np.zeros((width, width)) for width in widths]
    for number, bag in enumerate(bags):
        array = bag.read()
        rows = sample_rows(len(array), SCALE_INSTANCES, seed, 0, number)
        part = np.asarray(array if rows is None else array[rows], dtype=np.float64)
        total, square = total + part.mean(axis=0), square + (part**2).mean(axis=0)
        for product, end, width in zip(products, ends, widths, strict=True):
            own = part[:, end - width : end]
            product += own.T @ own / len(own)
    mean = total / len(bags)
    deviation = np.sqrt(np.maximum(square / len(bags) - mean**2, 0))
    means = [mean[end - width : end] for end, width in zip(ends, widths, strict=True)]
    covariances = [p / len(bags) - np.outer(m, m) for p, m in zip(products, means, strict=True)]
    features.fit(torch.from_numpy(mean), torch.from_numpy(deviation), [torch.from_numpy(c) for c in covariances])


def judge(model: BagModel, bags: Sequence[Bag], device: torch.device, precision: Precision = "float32") -> NDArray:
    """Return the logit of each bag, (n,) or (n, classes) float64, from all of its instances."""
    logits = [out.double().cpu().numpy() for out, _ in _outputs(model, bags, device, precision)]
    return np.asarray(logits)


def attention_of(
    model: BagModel, bags: Sequence[Bag], device: torch.device, precision: Precision = "float32"
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float32]]]:
    """Yield each bag's logit, () or (classes,), and its attention (N,), which sums to one."""
    for logit, attention in _outputs(model, bags, device, precision):
        yield logit.double().cpu().numpy(), attention.float().cpu().numpy()


def alone(
    model: BagModel, bag: Bag, device: torch.device, precision: Precision = "float32", at_once: int = 1024
) -> NDArray[np.float64]:
    """Return the logits of each instance as a bag of its own, (N,) or (N, classes): what the model sees in it."""
    model.eval()
    parts = []
    x = torch.from_numpy(np.ascontiguousarray(bag.read(), dtype=np.float32))[:, None]
    for part in x.split(at_once):
        with torch.inference_mode(), _autocast(device, precision):
            out = model(part.to(device), torch.ones(len(part), 1, dtype=torch.bool, device=device))
        parts.append(out.logit.double().cpu().numpy())
    return np.concatenate(parts)


def _outputs(
    model: BagModel, bags: Sequence[Bag], device: torch.device, precision: Precision
) -> Iterator[tuple[Tensor, Tensor]]:
    model.eval()
    for batch in batches(bags, [[number] for number in range(len(bags))]):
        with torch.inference_mode(), _autocast(device, precision):
            here = batch.to(device)
            out = model(here.x, here.mask)
        yield out.logit[0], out.attention[0]


def _autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


class BagTraining:
    """One training: `run` leaves the best weights in the model and returns the history.

    Raises: TrainingError when the loss is not finite.
    """

    def __init__(self, model: BagModel, config: TrainingConfig, train: Part, seed: int, device: torch.device) -> None:
        self.model, self.config, self.train, self.seed, self.device = model.to(device), config, train, seed, device
        steps = math.ceil(len(train.bags) / config.batch_size)
        self.schedule = OptimiserSettings(steps=steps * config.epochs, lr=config.lr, warmup=2 * steps)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.weights = _class_weights(train.labels, model.config.classes, config.class_weight)
        self.step = 0

    def run(self, validation: Part, watch: Callable[[EpochRecord], None] | None = None) -> list[EpochRecord]:
        """Train until the epochs or the patience end."""
        history: list[EpochRecord] = []
        best: tuple[float, float] | None = None
        since = 0
        kept: dict[str, Tensor] = {}
        for epoch in range(self.config.epochs):
            loss = self._epoch(epoch)
            validation_loss, area = self._validate(validation)
            rate = learning_rate(self.schedule, self.step - 1)
            history.append(EpochRecord(epoch, rate, loss, validation_loss, area))
            if watch is not None:
                watch(history[-1])
            if best is None or (area, -validation_loss) > best:
                best, since = (area, -validation_loss), epoch
                kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            elif epoch - since >= self.config.patience:
                break
        self.model.load_state_dict(kept)
        self.model.eval()
        return history

    def _epoch(self, epoch: int) -> float:
        self.model.train()
        order, size = epoch_order(len(self.train.bags), self.seed, epoch), self.config.batch_size
        groups = [order[at : at + size].tolist() for at in range(0, len(order), size)]
        total = torch.zeros((), device=self.device)
        for batch in batches(self.train.bags, groups, self.seed, epoch, self.config.instances):
            total += self._step(batch.to(self.device)) * len(batch.index)
        mean = float(total) / len(order)
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss must stay finite; epoch {epoch} ended with {mean}. Lower training.lr (now "
                f"{self.config.lr}), or use float32 (training.precision)."
            )
        return mean

    def _step(self, batch: Batch) -> Tensor:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.schedule, self.step)
        y = torch.from_numpy(self.train.labels[batch.index]).to(self.device)
        with _autocast(self.device, self.config.precision):
            loss = self.model.loss(batch.x, batch.mask, y, self.weights.to(self.device)[y])
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.step += 1
        return loss.detach()

    def _validate(self, part: Part) -> tuple[float, float]:
        logits = judge(self.model, part.bags, self.device, self.config.precision)
        _, mean, labels = part.by_group(logits)
        binary = mean.ndim == 1
        losses = np.logaddexp(0, np.where(labels == 1, -mean, mean)) if binary else _cross_entropies(mean, labels)
        weights = self.weights.cpu().numpy()[labels]
        score = mean if binary else softmax(mean, axis=1)
        found = Predictions((), labels, score, labels)  # nothing is called yet
        area = float(FIGURES["auroc"](found, np.ones((1, len(mean))))[0])
        return float((losses * weights).mean()), area


def _cross_entropies(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the cross-entropy of each: logits (n, classes), labels (n,) -> (n,)."""
    return -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]


def _class_weights(labels: NDArray[np.int64], classes: int, kind: str) -> Tensor:
    counts = np.bincount(labels, minlength=classes)
    balanced = len(labels) / (classes * counts) if kind == "balanced" else np.ones(classes)
    return torch.tensor(balanced, dtype=torch.float32)
