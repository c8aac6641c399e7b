"""Configuration of the extraction of features: one frozen dataclass, valid by construction.

It knows ranges and units, not models or files. `settings` are the keys that decide the features; all others may change
between two runs in one folder.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engine.core.config import ModelConfigSection, RayConfig
from engine.features.tile_encoders import FeatureConfig
from engine.slides.tile_grid import GridConfig
from engine.slides.tissue import TissueConfig


@dataclass(frozen=True)
class BlockConfig:
    """How the work is cut, and what counts as too damaged."""

    parents: int = 16
    """5x tiles per block: what is read, encoded and written together, and what a kill costs at most. A multiple of
    features.batch wastes nothing; 16 are up to 272 tiles, 54 MB."""
    tile_damage: float = 0.02
    """A tile with a larger damaged share than this is masked: `valid` 0, no features."""
    slide_damage: float = 0.25
    """A slide with a larger share of masked 20x tiles fails."""

    def __post_init__(self) -> None:
        if self.parents < 1:
            raise ValueError(f"blocks.parents must be at least 1; got {self.parents}.")
        for name in ("tile_damage", "slide_damage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"blocks.{name} must lie in 0..1, a share; got {getattr(self, name)}.")


@dataclass(frozen=True)
class ExtractConfig:
    """Everything the extraction needs, as stored in config.yaml."""

    slides: str
    """Folder of slides, with its sub-folders."""
    out: str = "runs/features"
    """Run folder; what it holds already is not made again."""
    mpp: float | None = None
    """µm/px of slides that state none, such as PNG and JPEG; None refuses them."""
    series: int | None = None
    """Number of the picture to read, of slides whose file holds several, counted from 0 as --dry-run and the report
    list them; None is the largest that is no label, macro or overview. A slide without such a picture fails."""
    overrides: str | None = None
    """CSV with slide,mpp or slide,mpp_x,mpp_y: µm/px that count more than what the files say."""
    tissue: str | None = None
    """Folder of SLIDE.geojson to take the tissue from, such as the edited `tissue` of an earlier run; a slide without
    a file there fails. None finds the tissue."""
    synthetic: bool = False
    """True notes in every bag that the slides are generated, so that nobody tests a classifier on them."""
    encoders: tuple[str, ...] = ("zoomldm",)
    """zoomldm and SSL encoders (demo, texture, uni, dinov2-reg-l, phikon, and the CLIPs quiltnet, plip, clip), all from
    one pass over the pixels. The bags of the first are in `features`, of others in `features_NAME`."""
    precision: Literal["float32", "float16"] = "float32"
    """Of the features on disk."""
    finder: TissueConfig = field(default_factory=TissueConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    blocks: BlockConfig = field(default_factory=BlockConfig)
    model: ModelConfigSection = field(default_factory=ModelConfigSection)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if not self.encoders or len(set(self.encoders)) != len(self.encoders):
            raise ValueError(f"encoders must be different names, at least one; got {list(self.encoders)}.")
        if self.mpp is not None and not self.mpp > 0:
            raise ValueError(f"mpp must be positive (µm/px); got {self.mpp}. 20x is about 0.5, 40x 0.25.")

    def folder_of(self, encoder: str) -> str:
        """Return the name of the folder of an encoder's bags."""
        return "features" if encoder == self.encoders[0] else f"features_{encoder}"

    def settings(self) -> dict[str, Any]:
        """Return the keys that decide features, dotted. Slides, µm/px and tissue count per slide, by their tiles."""
        sections = ("features", "grid", "finder")
        flat = {f"{s}.{k}": v for s in sections for k, v in asdict(getattr(self, s)).items()}
        model = {f"model.{k}": getattr(self.model, k) for k in ("dtype", "channels_last", "threads")}
        return {
            "encoders": self.encoders[0],  # others may be added later
            "precision": self.precision,
            "synthetic": self.synthetic,
            "blocks.tile_damage": self.blocks.tile_damage,
            **flat,
            **model,
        }
