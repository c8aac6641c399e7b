"""Settings of the trainer for prepared sets: one frozen dataclass per YAML section, valid by construction.

It knows ranges and units, not models or files. Keys map 1:1 to fields and to command-line flags. Defaults are the
published BRCA model's sizes; how long and how fast it was trained is not published, so those are ours.
"""

from dataclasses import dataclass, field
from typing import Literal

from engine.core.units import BRCA_SCALE
from engine.training.settings import OptimiserSettings, PlaceSettings, require

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class NetworkSettings:
    """Sizes of the three networks; finest level first. Not read when initial.model brings its own."""

    magnifications: tuple[str, ...] = BRCA_SCALE.names
    """What the model knows, base first; a token conditioner knows one."""
    base_mpp: float = BRCA_SCALE.base_mpp
    """µm/px of the base."""
    encoder: str = "uni"
    """SSL encoder whose vectors are the condition."""
    ssl_dim: int = 1024
    """Width of one SSL vector."""
    conditioner: Literal["summarizer", "token"] = "summarizer"
    """summarizer: 65 tokens of a grid (ZoomLDM); token: one of one vector (its single-scale predecessor)."""
    context: int = 512
    """Width of a condition token."""
    summarizer_width: int = 512
    """Width inside the Summarizer."""
    summarizer_layers: int = 12
    """Its transformer layers."""
    summarizer_heads: int = 8
    """Its attention heads."""
    summarizer_mlp: int = 2048
    """Width of its MLPs."""
    unet_channels: tuple[int, ...] = (192, 384, 576, 960)
    """U-Net width per level; every level but the finest has attention with one head."""
    unet_layers: int = 2
    """Residual blocks per level."""
    vae_channels: tuple[int, ...] = (128, 256, 512)
    """Autoencoder width per level; three levels make it f4."""
    vae_layers: int = 2
    """Residual blocks per level."""
    vae_attention: bool = True
    """Self-attention in its middle, as published; it ties every pixel of a decoded window to the window's border."""
    codes: int = 8192
    """Codes of width 3."""
    groups: int = 32
    """Groups of every group norm."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the U-Net predicts. The published code can only load epsilon."""

    def __post_init__(self) -> None:
        rule = "a token conditioner knows one magnification: model.magnifications must be one"
        require(self.conditioner != "token" or len(self.magnifications) == 1, rule, self.magnifications)


@dataclass(frozen=True)
class InitialSettings:
    """What training starts from. A part that is not named starts from random weights, but for the autoencoder."""

    model: str | None = None
    """A whole model, folder or Hub id, in our or the LDM layout: its sizes and all of its weights."""
    variant: str | None = None
    """Folder inside it ("brca")."""
    unet: str | None = None
    """U-Net alone: a folder that diffusers or we wrote, or an LDM checkpoint (.ckpt; EMA weights where it has them)."""
    vae: str | None = None
    """Autoencoder alone, likewise; it must be the one the latents were made with, and is not trained here."""
    conditioner: str | None = None
    """Conditioner alone, likewise."""

    def __post_init__(self) -> None:
        parts = [name for name in (self.unet, self.vae, self.conditioner) if name is not None]
        require(self.model is None or not parts, "initial.model brings all parts: name it or parts, not both", parts)

    @property
    def sources(self) -> tuple[str, ...]:
        """Return what the weights come from, folders or Hub ids."""
        model = self.model if self.model is None or self.variant is None else f"{self.model}/{self.variant}"
        return tuple(name for name in (model, self.unet, self.vae, self.conditioner) if name is not None)


@dataclass(frozen=True)
class AccumulatedSettings(OptimiserSettings):
    """An optimiser whose steps are shared by workers and computed in parts."""

    batch_size: int = 256
    """Patches per step, over all workers and parts together."""
    accumulate: int = 1
    """Parts a worker's share of a step is computed in, one after the other, to save memory."""
    decay: Literal["cosine", "constant"] = "constant"
    """After the warm-up: a cosine to 1 % at the last step, or the peak rate all the way (then steps may be raised)."""
    magnification_weights: tuple[float, ...] = ()
    """Chance of each magnification, base first, whatever the numbers of patches; empty = all alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.accumulate >= 1, "train.accumulate must be at least 1", self.accumulate)
        weights = self.magnification_weights
        require(not weights or (min(weights) >= 0 and sum(weights) > 0),
                "train.magnification_weights must be 0 or more, one of them positive", weights)  # fmt: skip


@dataclass(frozen=True)
class JointSettings(AccumulatedSettings):
    """Denoiser and Summarizer together."""

    steps: int = 400_000
    """Optimiser steps."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup: int = 10_000
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    ema: float = 0.9999
    """Decay of the averaged weights, reached by the warm-up (1 + n) / (10 + n); 0 = no average."""
    drop_condition: float = 0.1
    """Probability that a sample is trained without its condition, as a whole."""
    coarse_weights: tuple[float, ...] = (0.0, 0.0)
    """Extra weights of the error averaged over 8×8 and over 64×64 latent px; the published loss has none."""
    gradient_checkpointing: bool = False
    """Compute the U-Net's activations twice and keep fewer: about a third more time for far less memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.drop_condition <= 1, "train.drop_condition must lie in 0..1", self.drop_condition)
        require(len(self.coarse_weights) == 2, "train.coarse_weights must be two numbers", self.coarse_weights)


@dataclass(frozen=True)
class OutputSettings:
    """What is written when training ends, or with --export."""

    folder: str = "runs/train/model"
    """Folder of the averaged weights in our layout."""
    dtype: Literal["float32", "float16"] = "float32"
    """What they are stored in."""
    ldm: str | None = None
    """Folder for the same model in the LDM layout (weights.ckpt, config.yaml), which the published code loads."""


@dataclass(frozen=True)
class WorkerSettings:
    """Workers on Ray. The batch of a step is the same whatever their number."""

    enabled: bool = True
    """False trains in this process, without Ray."""
    address: str | None = None
    """Address of a running cluster; None starts or joins one as Ray would."""
    workers: int | None = None
    """Workers that share each step; None takes every GPU, or one worker on a CPU."""
    cpus_per_worker: int = 1
    """CPUs reserved for a worker."""
    max_failures: int = 3
    """Times the group is started again from the last checkpoint after a worker was lost."""

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 1, "ray.workers must be at least 1", self.workers)
        require(self.cpus_per_worker >= 1, "ray.cpus_per_worker must be at least 1", self.cpus_per_worker)
        require(self.max_failures >= 0, "ray.max_failures must be 0 or more", self.max_failures)


@dataclass(frozen=True)
class HeldoutSettings:
    """Patches that are measured on, and never learned from."""

    data: str | None = None
    """Folder of another prepared set, of other slides; None measures nothing."""
    patches: int = 24
    """Most patches per magnification."""
    samples: int = 4
    """Of these, how many are sampled and shown beside the real ones in RUN/samples.png; 0 for no picture."""
    stride: int = 50
    """Timesteps between two steps of these samples; 50 gives 20 steps."""

    def __post_init__(self) -> None:
        require(self.patches >= 1, "heldout.patches must be at least 1", self.patches)
        require(0 <= self.samples <= self.patches, "heldout.samples must lie in 0..heldout.patches", self.samples)
        require(1 <= self.stride <= 1000, "heldout.stride must lie in 1..1000", self.stride)


@dataclass(frozen=True)
class LearningConfig:
    """What every training on a prepared set reads."""

    data: str = "data"
    """Folder that engine.prepare wrote; every worker must see it."""
    run: str = "runs/train"
    """Folder of this run: checkpoint, log, TensorBoard. The same command continues. Every worker must see it."""
    seed: int = 0
    """Seed of initial weights, order of patches, timesteps and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks compute; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Of forward and backward passes; weights, their average and the optimiser's state stay float32. auto takes
    bfloat16 where the device multiplies it, else float32 (float16 on older GPUs), and keeps what a run began with."""
    threads: int = 2
    """CPU threads of the networks; a resume is bit-equal with the same number only."""
    loaders: int = 2
    """Threads that read patches ahead; 0 reads them when they are needed."""
    checkpoint_s: float = 900.0
    """Seconds between two checkpoints, rounded up to the next line of the log."""
    log_every: int = 50
    """Steps between two lines of the log."""
    tensorboard: bool = True
    """Write the same figures for TensorBoard into RUN/tensorboard (needs the package's extra "train")."""
    model: NetworkSettings = field(default_factory=NetworkSettings)
    """Sizes of the networks."""
    initial: InitialSettings = field(default_factory=InitialSettings)
    """Where their weights start."""
    output: OutputSettings = field(default_factory=OutputSettings)
    """What is written at the end."""
    ray: WorkerSettings = field(default_factory=WorkerSettings)
    """Workers."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed must lie in 0..2**31-1", self.seed)
        require(self.threads >= 1, "threads must be at least 1", self.threads)
        require(self.loaders >= 0, "loaders must be 0 or more", self.loaders)
        require(self.checkpoint_s > 0, "checkpoint_s must be positive", self.checkpoint_s)
        require(self.log_every >= 1, "log_every must be at least 1", self.log_every)


@dataclass(frozen=True)
class JointConfig(LearningConfig):
    """Denoiser and Summarizer on a prepared set."""

    task: Literal["denoiser"] = "denoiser"
    """What is trained."""
    places: PlaceSettings = field(default_factory=PlaceSettings)
    """What is learned before."""
    train: JointSettings = field(default_factory=JointSettings)
    """How."""
    heldout: HeldoutSettings = field(default_factory=HeldoutSettings)
    """What the averaged weights are measured on when they are written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.initial.model is not None or self.initial.vae is not None,
                "initial.vae (or initial.model) must name the autoencoder that made the latents", None)  # fmt: skip
        require(self.output.ldm is None or self.initial.model is not None
                or self.model.prediction_type == "epsilon",
                "the LDM layout of output.ldm knows model.prediction_type epsilon alone",
                self.model.prediction_type)  # fmt: skip
