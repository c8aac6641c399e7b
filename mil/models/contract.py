"""What every model of bags is: instances and a mask in, logits and one attention per instance out.

Held by one set of tests for all models: padding does not matter, a bag of one instance has an answer, every parameter
gets a gradient, a bag of 100 000 instances takes bounded memory, and, where `permutation_invariant` says so, the order
of instances does not matter. Models know no files, names of classes, or optimisers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASKED = -1e30
"""Score of padding: exp of it is 0 beside any real score, and a chunk of nothing but padding stays finite."""

WHITENING_DAMPING = 1e-2
"""Variance of a standardised direction below which whitening no longer makes it count as much as the others."""


@dataclass(frozen=True)
class BagOutput:
    """What a model says about B bags of up to N instances."""

    logit: Tensor
    """Of two classes (B,): log-odds of the second; of more (B, classes): their softmax is the probabilities. Neither is
    calibrated."""
    attention: Tensor
    """(B, N): not negative, sums to one over a bag's instances, 0 on padding."""


@dataclass(frozen=True)
class ModelConfig:
    """What a model is built from; stored beside its weights."""

    name: str
    """One of `mil.models.MODELS`."""
    widths: tuple[int, ...]
    """Lengths of the parts of an instance, fine to coarse."""
    hidden: int = 256
    """Width of an embedded instance."""
    attention: int = 128
    """Width of the attention's hidden layer."""
    dropout: float = 0.25
    """Share of embedded values dropped in training."""
    whiten: bool = False
    """Features are decorrelated, scale by scale, before anything else."""
    classes: int = 2
    """Classes told apart."""

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def outputs(self) -> int:
        """Return the width of a head: two classes need one log-odds."""
        return 1 if self.classes == 2 else self.classes


class FeatureScale(nn.Module):
    """Standardise each feature by the training bags' mean and deviation; a constant feature becomes 0.

    Whitening then decorrelates the features of a scale: each direction counts alike, damped for those of hardly any
    variance. It is the symmetric root (ZCA), which is unique, so a feature stays near itself.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, widths: tuple[int, ...], whiten: bool) -> None:
        super().__init__()
        self.widths, self.whiten = widths, whiten
        self.register_buffer("mean", torch.zeros(sum(widths)))
        self.register_buffer("scale", torch.ones(sum(widths)))
        for number, width in enumerate(widths if whiten else ()):
            self.register_buffer(f"whitener_{number}", torch.eye(width))

    def fit(self, mean: Tensor, deviation: Tensor, covariances: Sequence[Tensor] = ()) -> None:
        """Take the figures of the training bags: (D,) each, and to whiten, one (D, D) per scale, in float64."""
        scale = torch.where(deviation > 1e-6 * mean.abs() + 1e-12, 1 / deviation.clamp_min(1e-30), 0.0)
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        for number, (covariance, own) in enumerate(zip(covariances, scale.split(self.widths), strict=self.whiten)):
            values, axes = torch.linalg.eigh(covariance * own[:, None] * own)
            root = (axes / (values.clamp_min(0) + WHITENING_DAMPING).sqrt()) @ axes.T
            self.get_buffer(f"whitener_{number}").copy_(root)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) * self.scale
        if not self.whiten:
            return x
        parts = x.split(self.widths, dim=-1)
        return torch.cat([part @ self.get_buffer(f"whitener_{i}") for i, part in enumerate(parts)], dim=-1)


class BagModel(nn.Module, ABC):
    """The contract; `forward` is the model's own."""

    permutation_invariant: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.features = FeatureScale(config.widths, config.whiten)

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor) -> BagOutput:
        """Judge bags x (B, N, D) whose instances are where mask (B, N) is True."""

    def loss(self, x: Tensor, mask: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Return the mean loss of bags with labels y (B,), numbers of their classes, weighted by weight (B,)."""
        return cross_entropy(self(x, mask).logit, y, weight)


def cross_entropy(logit: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over bags of the cross-entropy times the bag's weight: logit (B,) or (B, classes)."""
    if logit.ndim > 1:
        return (F.cross_entropy(logit.float(), y.long(), reduction="none") * weight).mean()
    return F.binary_cross_entropy_with_logits(logit.float(), y.float(), weight=weight)


def embedding(width: int, config: ModelConfig) -> nn.Sequential:
    """Return the layer that embeds one instance, as CLAM has it in front of its attention."""
    return nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU(), nn.Dropout(config.dropout))
