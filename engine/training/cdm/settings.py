"""Settings of the CDM's trainer: what configs/train_cdm.yaml says. It knows ranges, not models or files."""

from dataclasses import dataclass, field
from typing import Literal

from engine.training.settings import CarriedTrainingConfig, OptimiserSettings, require


@dataclass(frozen=True)
class CDMSizes:
    """Sizes of the network; tokens, channels and magnifications are the model's."""

    width: int = 768
    """Width of a token inside; 768 with 12 layers and 12 heads is the published DiT-B."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads."""
    standardised: bool = True
    """Learn summaries less their mean, over their spread, per magnification and entry: it learns much sooner. The
    published files cannot hold these numbers; false for `published`."""


@dataclass(frozen=True)
class SummarySettings:
    """Which summaries the CDM learns from: windows of stored SSL grids, through the model's Summarizer."""

    train: str = "data/train/*.npy"
    """What to learn from: the folder of a prepared set, or a glob of grids, one per region or slide: (D, h, w) in .npy,
    .h5 or .zarr, one SSL vector per base cell, by the model's encoder."""
    heldout: str = "data/heldout/*.npy"
    """What is only measured on, likewise."""
    per_magnification: tuple[int, ...] = (4096,)
    """Windows per magnification, base first; fewer where the grids have fewer. One number stands for all."""
    heldout_per_magnification: int = 512
    """Held-out windows per magnification."""

    def __post_init__(self) -> None:
        require(len(self.per_magnification) > 0 and min(self.per_magnification) >= 1,
                "summaries.per_magnification must be positive", self.per_magnification)  # fmt: skip
        require(self.heldout_per_magnification >= 1,
                "summaries.heldout_per_magnification must be at least 1", self.heldout_per_magnification)  # fmt: skip


@dataclass(frozen=True)
class CDMOptimiserSettings(OptimiserSettings):
    """AdamW on the squared error of x0."""

    magnification_weights: tuple[float, ...] = (1.0,)
    """Share of each magnification in a batch, base first; one number = equal shares. Data sets have a thousand times
    fewer patches at the coarsest magnification than at the base, so shares by count would not teach it."""
    time_power: float = 1.0
    """Times are 1000·u**time_power with u uniform: 1 as published. Unless they are standardised, summaries of one
    magnification differ by a fraction of their distance from zero, so what tells them apart is decided at early times;
    2 visits these more often."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(min(self.magnification_weights, default=-1.0) >= 0 and sum(self.magnification_weights) > 0,
                "train.magnification_weights must be positive", self.magnification_weights)  # fmt: skip
        require(0 < self.time_power <= 4, "train.time_power must lie in (0, 4]", self.time_power)


@dataclass(frozen=True)
class CDMTrainingConfig(CarriedTrainingConfig):
    """Everything the CDM's trainer reads; the resolved form is written into the run folder and training.json."""

    task: Literal["cdm"] = "cdm"
    """What is trained."""
    run: str = "runs/train_cdm"
    """Folder of this run: summaries, checkpoint, log. The same folder continues."""
    out: str = "runs/train_cdm/cdm"
    """Folder the CDM is written to; cdm/ in a model's folder is where the model's users find it."""
    published: str | None = None
    """Also write the published file ({"ema": …}) here."""
    model: CDMSizes = field(default_factory=CDMSizes)
    """Sizes of the network."""
    summaries: SummarySettings = field(default_factory=SummarySettings)
    """What is learned."""
    train: CDMOptimiserSettings = field(
        default_factory=lambda: CDMOptimiserSettings(steps=400_000, batch_size=256, lr=1e-4, warmup=1000, ema=0.9999)
    )
    """How it is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.published is None or not self.model.standardised,
                "published needs model.standardised false (the published file cannot hold mean and spread)",
                self.published)  # fmt: skip
