"""Settings of the VQ autoencoder's training; it knows ranges, not models or files."""

from dataclasses import dataclass, field
from typing import Literal

from engine.training.denoiser.settings import AccumulatedSettings, LearningConfig
from engine.training.settings import require


@dataclass(frozen=True)
class VQSettings(AccumulatedSettings):
    """Encoder, codebook and decoder together: pixels' L1, codebook and commitment; nothing perceptual."""

    steps: int = 100_000
    """Optimiser steps."""
    batch_size: int = 32
    """Crops per step, over all workers and parts together."""
    lr: float = 3e-5
    """Peak learning rate."""
    warmup: int = 1000
    """Steps of linear warm-up."""
    ema: float = 0.999
    """Decay of the averaged weights, reached by the warm-up (1 + n) / (10 + n); 0 = no average."""
    crop_px: int = 256
    """Side of a random crop of a patch; patches are also turned and mirrored."""
    gradient_weight: float = 0.5
    """Weight of the L1 of the picture's first differences, which keeps edges without a perceptual loss."""
    codebook_weight: float = 1.0
    """Weight of the codebook and commitment terms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.crop_px <= 256 and self.crop_px % 32 == 0,
                "train.crop_px must be a multiple of 32, at most 256", self.crop_px)  # fmt: skip
        require(self.gradient_weight >= 0, "train.gradient_weight must be 0 or more", self.gradient_weight)
        require(self.codebook_weight > 0, "train.codebook_weight must be positive", self.codebook_weight)


@dataclass(frozen=True)
class VQConfig(LearningConfig):
    """The VQ autoencoder on the images of a prepared set (engine.prepare --keep_images)."""

    task: Literal["autoencoder"] = "autoencoder"
    """What is trained."""
    train: VQSettings = field(default_factory=VQSettings)
    """How."""
