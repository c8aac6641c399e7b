"""Configuration of a cohort: a picture's keys, and what a job of many needs; frozen, valid by construction.

It knows ranges and units, not tables, files or models.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from engine.conditions.patch_sampler import SCHEDULERS, PatchSampler
from engine.core.config import require
from engine.features.tile_encoders import FeatureConfig
from engine.generation.run import PLACES
from engine.sampling.config import OutputConfig, RunConfig
from engine.slides.tile_grid import GridConfig
from engine.slides.tissue import TissueConfig


@dataclass(frozen=True)
class RecipeConfig:
    """Variations of slides, in place of a table: regions on their tissue, drawn from a seed."""

    variations: int = 1
    """Pictures (or bags) of each slide of `slides`."""
    labels: str | None = None
    """CSV with the columns `slide` and `patient`, one row per slide; its other columns are copied into labels.csv. A
    slide that is not in it fails. None: nothing is labelled."""
    min_tissue: float = 0.6
    """Share of a region that must be tissue."""
    seed: int = 0
    """Of the regions and of the pictures."""

    def __post_init__(self) -> None:
        require(self.variations >= 1, "recipe.variations must be at least 1", self.variations)
        require(0 < self.min_tissue <= 1, "recipe.min_tissue must lie in (0, 1], a share", self.min_tissue)
        require(0 <= self.seed < 2**31, "recipe.seed must lie in 0..2**31-1", self.seed)


@dataclass(frozen=True)
class BagsConfig:
    """Bags without pictures (`bags_only`): patches drawn on the conditions of real tiles, and encoded at once."""

    tiles: int = 1000
    """Fine tiles (20x) of each bag; each costs one patch, and so does each 5x tile that holds some of them."""
    scheduler: str = "ddim"
    """ddim, ddpm, dpmsolver++, euler or unipc, as diffusers implements them."""
    steps: int = 50
    """Its steps."""
    scale: float = 2.0
    """Guidance scale s = 1 + w of a patch; 1 leaves the null call out."""
    strength: float = 1.0
    """How far patches leave their source: 1 draws them from noise, on its vectors alone; less begins from its tile,
    noised so that this share of the steps is left. Below 1 every row needs a reference."""
    encoders: tuple[str, ...] = ("zoomldm",)
    """As of engine.extract_features: zoomldm, and SSL encoders. Bags of the first are in `features`."""
    precision: Literal["float32", "float16"] = "float32"
    """Of the features on disk."""

    def sampler(self, seed: int) -> PatchSampler:
        """Return what draws the patches of a bag."""
        return PatchSampler(self.scheduler, self.steps, self.scale, seed, self.strength)

    def __post_init__(self) -> None:
        require(self.tiles >= 1, "bags.tiles must be at least 1", self.tiles)
        require(self.steps >= 1, "bags.steps must be at least 1", self.steps)
        require(self.scale >= 1, "bags.scale must be at least 1", self.scale)
        require(0 < self.strength <= 1, "bags.strength must lie in (0, 1], a share of the steps", self.strength)
        require(self.scheduler in SCHEDULERS, f"bags.scheduler must be one of {', '.join(SCHEDULERS)}", self.scheduler)
        require(
            0 < len(self.encoders) == len(set(self.encoders)),
            "bags.encoders must be different names, at least one",
            list(self.encoders),
        )


OF_ROWS = ("reference", "embeddings", "text", "text_map", "guide")
"""Keys of a picture that a row of the table says, not the configuration."""


@dataclass(frozen=True)
class CohortConfig(RunConfig):
    """A picture's keys, which all pictures share, and what a cohort needs. `canvas.height` and `canvas.width` serve
    rows that say none; `output.folder` is not used."""

    output: OutputConfig = field(default_factory=lambda: OutputConfig(formats=()))
    table: str | None = None
    """CSV, one row per picture. Columns: name; reference (slide or picture) with region, or embeddings, or text, or
    none of them (the CDM dreams); seed, height, width, label, patient, source_patient, source_slide."""
    slides: str | None = None
    """Folder in which references are looked up by name; without a table, the slides that a recipe varies."""
    out: str = "runs/cohort"
    """Folder of the cohort; what it holds already is not made again."""
    picture: Literal["ome-tiff", "tiff"] = "ome-tiff"
    """Format of the files in OUT/pictures, which engine.extract_features reads as slides; `output.formats` are written
    into the run folders besides."""
    keep: Literal["runs", "pictures"] = "runs"
    """runs: each picture's run folder stays, for the viewer, engine.quality and --redo. pictures: its latents and
    OME-Zarr go when its file is written, which takes a third of the room."""
    label: str = "label"
    """What the label is called, such as subtype: its column in labels.csv, and in the table of a recipe."""
    mpp: float | None = None
    """µm/px of slides that state none."""
    bags_only: bool = False
    """Draw no pictures: bags of single tiles on the conditions of each row's reference, encoded at once."""
    coordinators: int | None = None
    """On Ray: processes that each lead pictures over their share of the replicas; None: one per 4 replicas."""
    pictures_at_once: int = 4
    """On Ray: pictures that a coordinator leads side by side, so that no replica waits while one begins or ends."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    bags: BagsConfig = field(default_factory=BagsConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    finder: TissueConfig = field(default_factory=TissueConfig)
    grid: GridConfig = field(default_factory=GridConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in OF_ROWS if getattr(self, name) is not None]
        require(
            not given and self.condition == "reference",
            "reference, embeddings, text, condition and guide are said by the rows of a cohort's table",
            given or self.condition,
            "Make them columns.",
        )
        require(
            self.table is not None or self.slides is not None,
            "a cohort needs --table (one row per picture) or --slides (a folder to vary)",
            "neither",
        )
        require(self.mpp is None or self.mpp > 0, "mpp must be positive (µm/px)", self.mpp)
        require(self.coordinators is None or self.coordinators >= 1, "coordinators must be at least 1",
                self.coordinators)  # fmt: skip
        require(self.pictures_at_once >= 1, "pictures_at_once must be at least 1", self.pictures_at_once)
        reserved = ("name", "slide", "patient", "source_patient", "source_slide", "seed", "file", "status", "reason")
        require(bool(self.label) and self.label not in reserved,
                "label must name the column of labels.csv that holds the label", self.label)  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Return the keys that all pictures share and that decide their bytes, dotted."""
        sizes = ("canvas.height", "canvas.width", "sampling.seed", "canvas.store")
        plain = RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})
        shared = {k: v for k, v in plain.picture_keys().items() if k not in (*sizes, *PLACES, *OF_ROWS)}
        found = {**shared, "bags_only": self.bags_only}
        if not self.bags_only:
            drawn = {name: getattr(self, name) for name in ("cdm_steps", "text_steps", "text_weight", "picture")}
            return found | drawn
        sections = {"bags": self.bags, "features": self.features, "finder": self.finder, "grid": self.grid}
        found |= {f"{s}.{k}": v for s, of in sections.items() for k, v in asdict(of).items()}
        if self.bags.strength == 1:
            del found["bags.strength"]  # earlier cohorts do not say, and are continued all the same
        return found
