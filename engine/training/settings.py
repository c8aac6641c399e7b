"""Settings that trainers share, and those of the demo model: one frozen dataclass per YAML section, valid when built.

It knows ranges and units, not models or files. Keys map 1:1 to fields and to command-line flags.
"""

from dataclasses import dataclass, field
from typing import Literal


def require(ok: bool, rule: str, came: object) -> None:
    if not ok:
        raise ValueError(f"{rule}; got {came!r}.")


def settled(bfloat16: bool | Literal["auto"]) -> bool:
    """Return the key's value. Raises ValueError for auto, which must be settled before anything is computed."""
    if bfloat16 == "auto":
        raise ValueError("bfloat16=auto must be settled by engine.training.precision before it is used; it is not.")
    return bfloat16


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of the three networks; finest level first."""

    unet_channels: tuple[int, ...] = (32, 64, 96, 128)
    """U-Net width per level; every level but the finest has attention with one head."""
    unet_layers: int = 1
    """Residual blocks per level."""
    context: int = 128
    """Width of a condition token."""
    summarizer_layers: int = 3
    """Transformer layers of the Summarizer."""
    heads: int = 4
    """Attention heads of the Summarizer; its MLP is twice as wide as a token."""
    vae_channels: tuple[int, ...] = (32, 32, 64)
    """Autoencoder width per level; three levels make it f4."""
    codes: int = 2048
    """Codes of width 3."""
    groups: int = 8
    """Groups of every group norm; 32 groups on 32 channels would be an instance norm."""


@dataclass(frozen=True)
class DataSettings:
    """Which phantoms are rendered, and how many of their tiles are drawn to fit and to measure on."""

    train_regions: int = 28
    """Regions to learn from; their seeds are 0, 1, 2, ..."""
    heldout_regions: int = 4
    """Regions only measured on; their seeds are 10000, 10001, ..."""
    region_cells: int = 32
    """Side of a region in cells of 256 base px (32 = 8192 px = 4.1 mm at 0.5 µm/px)."""
    train_tiles: tuple[int, ...] = (5400, 1200, 1800, 1200, 2400)
    """Training tiles drawn per magnification, base first. Codebook and scale of latents are fitted to a thirtieth of
    them; the crops that are trained on come from anywhere in the regions."""
    heldout_tiles: int = 24
    """Held-out tiles per magnification."""
    encoder_cells: int = 2048
    """Training cells the SSL encoder is fitted on."""

    def __post_init__(self) -> None:
        require(self.train_regions >= 1, "data.train_regions must be at least 1", self.train_regions)
        require(self.heldout_regions >= 1, "data.heldout_regions must be at least 1", self.heldout_regions)
        require(self.region_cells >= 1, "data.region_cells must be at least 1", self.region_cells)
        require(min(self.train_tiles) >= 1, "data.train_tiles must be positive", self.train_tiles)
        require(self.heldout_tiles >= 1, "data.heldout_tiles must be at least 1", self.heldout_tiles)


@dataclass(frozen=True)
class OptimiserSettings:
    """One run of AdamW with warm-up, cosine decay and an average of the weights."""

    steps: int = 1000
    """Optimiser steps; the cosine ends here."""
    batch_size: int = 16
    """Tiles or crops per step."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 50
    """Steps of linear warm-up."""
    decay: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine to 1 % at the last step, or the peak rate all the way (then steps may be raised)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, reached by the warm-up (1 + n) / (10 + n); 0 = no average."""
    max_skipped: int = 20
    """Steps with a loss that is not finite, before the run gives up."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps must be at least 1", self.steps)
        require(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size)
        require(self.lr > 0, "lr must be positive", self.lr)
        require(self.warmup >= 0, "warmup must be 0 or more", self.warmup)
        require(self.clip > 0, "clip must be positive", self.clip)
        require(0 <= self.ema < 1, "ema must lie in [0, 1)", self.ema)
        require(self.max_skipped >= 0, "max_skipped must be 0 or more", self.max_skipped)


@dataclass(frozen=True)
class AutoencoderSettings:
    """The VQ autoencoder: first without a codebook, then the decoder learns to live with it."""

    plain: OptimiserSettings = field(default_factory=lambda: OptimiserSettings(steps=1500, batch_size=8))
    """Encoder and decoder without the codebook."""
    quantised: OptimiserSettings = field(default_factory=lambda: OptimiserSettings(steps=500, batch_size=8))
    """The decoder alone, behind the codebook."""
    crop_px: int = 128
    """Side of a training crop in px."""
    plain_shares: tuple[float, ...] = (0.4, 0.15, 0.15, 0.15, 0.15)
    """Share of each magnification in the crops of the plain stage, base first."""
    quantised_shares: tuple[float, ...] = (0.15, 0.10, 0.25, 0.35, 0.15)
    """The same for the quantised stage; the middle magnifications are the hardest for the decoder."""
    latent_noise: float = 0.1
    """Noise on the plain latents, in their standard deviations: the decoder must forgive the denoiser."""
    colour_weight: float = 0.1
    """Weight of the linear map from latents to mean colours."""
    gradient_weight: float = 0.5
    """Weight of the error of the picture's first differences."""

    def __post_init__(self) -> None:
        require(self.crop_px % 32 == 0 and self.crop_px > 0,
                 "autoencoder.crop_px must be a multiple of 32", self.crop_px)  # fmt: skip
        for name, shares in (("plain_shares", self.plain_shares), ("quantised_shares", self.quantised_shares)):
            require(min(shares) >= 0 and sum(shares) > 0, f"autoencoder.{name} must be positive", shares)
        require(self.latent_noise >= 0, "autoencoder.latent_noise must be 0 or more", self.latent_noise)


@dataclass(frozen=True)
class PlaceSettings:
    """What fresh networks learn about the places of cells before they denoise; off unless asked for.

    For small networks with a Summarizer, attention with one head and no model to start from.
    """

    token_steps: int = 0
    """Steps in which the Summarizer learns to tell place and content of its cells; 300 for the demo."""
    path_steps: int = 0
    """Steps in which the U-Net learns to tell where its pixels lie; 250 for the demo."""
    batch_size: int = 24
    """Grids per step of the Summarizer; the U-Net takes two of their patches."""
    look_up_weight: float = 0.1
    """Weight of the cross-entropy between attention and a pixel's own cell, at the start of denoising."""
    look_up_steps: int = 2000
    """Step at which that weight has fallen to zero, linearly."""

    def __post_init__(self) -> None:
        require((self.token_steps > 0) == (self.path_steps > 0),
                 "places.token_steps and places.path_steps must both be positive or both be 0",
                 (self.token_steps, self.path_steps))  # fmt: skip
        require(min(self.token_steps, self.look_up_steps) >= 0, "places: steps must be 0 or more", self.token_steps)
        require(self.batch_size >= 4, "places.batch_size must be at least 4", self.batch_size)
        require(self.look_up_weight >= 0, "places.look_up_weight must be 0 or more", self.look_up_weight)


@dataclass(frozen=True)
class TrainingConfig:
    """What every trainer of a small network reads, beside what it learns."""

    run: str = "runs/train"
    """Folder of this run: checkpoint, log. The same folder continues."""
    seed: int = 0
    """Seed of initial weights, data order, times and noise."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the networks compute."""
    bfloat16: bool | Literal["auto"] = "auto"
    """Compute forward passes in bfloat16 (weights stay float32); auto: where the device multiplies it."""
    threads: int = 1
    """CPU threads."""
    checkpoint_s: float = 120.0
    """Seconds between two checkpoints."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed must lie in 0..2**31-1", self.seed)
        require(self.threads >= 1, "threads must be at least 1", self.threads)
        require(self.checkpoint_s > 0, "checkpoint_s must be positive", self.checkpoint_s)


@dataclass(frozen=True)
class CarriedTrainingConfig(TrainingConfig):
    """Of a network that a finished model carries in a folder of its own, such as a CDM or a text prior."""

    source: str = "demo"
    """The model whose conditions are learned: "demo", a folder or a Hub id."""
    variant: str | None = None
    """Sub-folder of the source: brca or naip for the published weights."""
    store_half: bool = False
    """Write the weights as float16; they are loaded as float32."""


@dataclass(frozen=True)
class DemoConfig(TrainingConfig):
    """What the demo model is before its denoiser is trained; the resolved form is written into training.json."""

    task: Literal["demo"] = "demo"
    """What is trained."""
    run: str = "runs/train_demo"
    """Folder of this run: rendered regions, checkpoints, log, pictures. The same folder continues."""
    out: str = "runs/train_demo/model"
    """Folder the model is written to, with a U-Net and a Summarizer that know nothing yet."""
    threads: int = 2
    """CPU threads."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """Sizes of the networks."""
    data: DataSettings = field(default_factory=DataSettings)
    """Phantoms and tiles."""
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    """What is trained here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        per_magnification = {
            "data.train_tiles": self.data.train_tiles,
            "autoencoder.plain_shares": self.autoencoder.plain_shares,
            "autoencoder.quantised_shares": self.autoencoder.quantised_shares,
        }
        lengths = {name: len(values) for name, values in per_magnification.items()}
        require(len(set(lengths.values())) == 1, "one number per magnification is needed in each list", lengths)
