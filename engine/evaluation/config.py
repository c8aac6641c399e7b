"""What a comparison is asked for: keys of the command line and of YAML, valid by construction."""

from dataclasses import dataclass
from typing import Literal

from engine.evaluation.samples.crops import CropRule
from engine.evaluation.samples.encoders import INCEPTION, NAMES


@dataclass(frozen=True)
class QualityConfig:
    """Two sets, how their crops are taken, what they are seen by, and what is computed."""

    a: str
    """What is judged: a run, picture, slide, folder of them, or bag(s) of features; may be given first, without --a."""
    b: str | None = None
    """What it is judged by, likewise; may be given second. None: only what a run tells by itself (detail, canvas)."""
    encoder: str = "demo"
    """demo, texture (nothing to fetch), dinov2-reg-l, phikon, uni, quiltnet, plip, or clip (any CLIP vision tower of
    transformers)."""
    encoder_source: str | None = None
    """Folder or Hub id of the encoder's weights; None takes where they were published. clip needs it."""
    inception: str | None = None
    """File with the weights of the FID papers' Inception-v3 (pt_inception-2015-12-05, or safetensors): the encoder."""
    crop_mpp: float | None = None
    """µm/px of the crops; None: the one that all pictures have."""
    mpp: float | None = None
    """µm/px of pictures that state none (PNG, JPEG)."""
    count: int | None = None
    """Crops of each set; None takes all, at most 5000. Fewer than asked for is an error."""
    stride: int = 256
    """px between neighbouring crops; below 256 they overlap and are no independent samples."""
    min_tissue: float = 0.25
    """Share of a crop that must be tissue."""
    tissue_grey: float = 215.0
    """Mean grey (0..255) below which a px is tissue; 256 counts every px, for aerial pictures with snow or glare."""
    patches: int = 0
    """Single patches to draw with the model and conditions of each run in A, to judge its canvas by; 0: none."""
    paired: bool = False
    """Compare pictures of equal name crop by crop: the embedding similarity."""
    training: str | None = None
    """What the model was trained on (pictures, or a prepared set with images): how near A and B lie to it."""
    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    kid_subsets: int = 100
    """Random subsets of KID."""
    kid_size: int = 1000
    """Crops in each; half of the smaller set if that is less."""
    directions: int = 1000
    """Random directions of MIND."""
    seed: int = 0
    """Of crops, subsets, directions and patches."""
    batch: int = 16
    """Crops encoded together."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where encoder and model compute."""
    threads: int = 1
    """CPU threads."""
    out: str = "runs/quality"
    """Folder for quality.json and quality.html."""

    protocol: Literal["zoomldm", "large-image-diffusion"] | None = None
    """The table of a paper. zoomldm: A is a model, B a prepared set with images. large-image-diffusion: A are runs."""
    variant: str | None = None
    """Sub-folder of the model A: brca or naip (protocol zoomldm)."""
    clip: str | None = None
    """Folder or Hub id of the CLIP for CLIP FID (protocol large-image-diffusion)."""

    def __post_init__(self) -> None:
        if self.encoder not in NAMES:
            raise ValueError(f"encoder must be one of {', '.join(NAMES)}; got {self.encoder!r}.")
        lowest = {"stride": 1, "patches": 0, "neighbours": 1, "kid_subsets": 1, "kid_size": 2, "directions": 1,
                  "batch": 1, "threads": 1}  # fmt: skip
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}; got {getattr(self, name)}.")
        if self.count is not None and self.count < 2:
            raise ValueError(f"count must be at least 2, or a set has no spread; got {self.count}.")
        for name in ("crop_mpp", "mpp"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive (µm/px); got {value}. 20x is 0.5.")
        if not 0 <= self.min_tissue <= 1 or not 0 < self.tissue_grey <= 256:
            raise ValueError(
                f"min_tissue must lie in 0..1 and tissue_grey in 0..256; got {self.min_tissue} and {self.tissue_grey}."
            )
        if self.b is None and (self.paired or self.training):
            raise ValueError("paired and training compare with B; got no B. Name it second, or drop them.")

    @property
    def seen_by(self) -> tuple[str, str | None]:
        """The encoder's name, and where its weights lie."""
        return (self.encoder, self.encoder_source) if self.inception is None else (INCEPTION, self.inception)

    def rule(self, mpp: float) -> CropRule:
        """Return the crop rule at a µm/px."""
        return CropRule(mpp, self.count, self.stride, self.min_tissue, self.tissue_grey, self.seed)
