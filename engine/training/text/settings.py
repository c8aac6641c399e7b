"""Settings of the text prior's trainer: what configs/train_text.yaml says. It knows ranges, not models or files."""

from dataclasses import dataclass, field
from typing import Literal

from engine.training.settings import CarriedTrainingConfig, OptimiserSettings, require


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the network; the channels of its vectors are the model's, those of the text the tower's."""

    width: int = 384
    """Width of a token inside."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 6
    """Attention heads."""
    window: int = 16
    """Cells of the largest described region on each axis that is learned; 16 = 4096 px at the base."""
    word_layers: int = 1
    """tower=words: transformer blocks of the tower, which is trained with the prior."""


@dataclass(frozen=True)
class CaptionSettings:
    """Which captions are learned."""

    train: str = "data/train/captions.csv"
    """Table slide,x,y,width,height,text to learn from; or, without captions, a folder of bags of the tower's own vision
    side (engine.extract_features --encoders [quiltnet]), whose vectors stand for texts."""
    train_grids: str = "data/train/*.npy"
    """The SSL grids of its slides: a prepared set's folder, or a glob of files (D, h, w) that are named as slides."""
    heldout: str = "data/heldout/captions.csv"
    """What is only measured on, likewise."""
    heldout_grids: str = "data/heldout/*.npy"
    """The grids of its slides."""
    texts: str | None = None
    """Without captions: a file with at least 20 texts as users will write them, one a line. Their mean is what texts
    have in common, which is taken from every text, as the mean of the pictures is from theirs."""
    noise: float = 0.5
    """Without captions: noise on a picture's vector, as a share of how much those vectors differ. A text says less."""

    def __post_init__(self) -> None:
        require(self.noise >= 0, "captions.noise must be 0 or more", self.noise)


@dataclass(frozen=True)
class TextOptimiserSettings(OptimiserSettings):
    """AdamW on the squared error of x0."""

    drop_text: float = 0.1
    """Share of a batch that is learned without its text, for classifier-free guidance."""
    region_weight: float = 8.0
    """Weight of the error of a region's mean vector, channel by channel as much as regions differ in it. A text says
    what a region holds on the whole, which is a few percent of the variance of single cells."""
    time_power: float = 0.35
    """Times are 1000·u**time_power with u uniform. A text tells something only where the noise leaves little of the
    grid, at late times; 0.35 puts half of a batch above t = 780. 1 is uniform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.drop_text < 1, "train.drop_text must lie in 0..1", self.drop_text)
        require(self.region_weight >= 0, "train.region_weight must be 0 or more", self.region_weight)
        require(0 < self.time_power <= 4, "train.time_power must lie in (0, 4]", self.time_power)


@dataclass(frozen=True)
class TextTrainingConfig(CarriedTrainingConfig):
    """Everything the text prior's trainer reads; the resolved form is written into the run folder and training.json."""

    task: Literal["text"] = "text"
    """What is trained."""
    run: str = "runs/train_text"
    """Folder of this run: checkpoint, log. The same folder continues."""
    out: str = "runs/train_text/text"
    """Folder the prior is written to; text/ in a model's folder is where the model's users find it."""
    tower: Literal["words", "quiltnet", "plip", "clip"] = "words"
    """Text tower: words is trained with the prior and knows the captions' words alone; quiltnet is the one for
    pathology."""
    tower_source: str | None = None
    """Folder with the tower's weights and tokenizer; None takes where they were published."""
    model: TextSizes = field(default_factory=TextSizes)
    """Sizes of the network."""
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    """What is learned."""
    train: TextOptimiserSettings = field(
        default_factory=lambda: TextOptimiserSettings(steps=200_000, batch_size=128, lr=1e-4, warmup=1000, ema=0.9999)
    )
    """How it is learned."""
