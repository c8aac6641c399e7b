"""Configuration of the preparation of a training set: one frozen dataclass, valid by construction.

It knows ranges and units, not models or files. `settings` are the keys that decide what is prepared; all others may
change between two runs in one folder.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engine.core.config import ModelConfigSection, RayConfig
from engine.core.units import BRCA_SCALE, NAIP_SCALE, MagnificationScale
from engine.slides.tissue import TissueConfig

SQUARE = 4
"""Cells on each axis that are read at once: 1024² px at the base magnification."""


@dataclass(frozen=True)
class PrepareBlocks:
    """How the work is cut, and what counts as too damaged."""

    patches: int = 64
    """Cells or patches per block, a multiple of 16: what is read, encoded and written together, and what a kill costs
    at most; 64 are 13 MB of pixels."""
    batch: int = 16
    """Patches per call of the autoencoder and of the SSL encoder, in one shape."""
    tile_damage: float = 0.02
    """A patch or cell with a larger damaged share than this is left out, and all patches over it."""
    slide_damage: float = 0.25
    """A slide of which a larger share of the base patches is left out fails."""

    def __post_init__(self) -> None:
        if self.patches < SQUARE**2 or self.patches % SQUARE**2:
            raise ValueError(f"blocks.patches must be a multiple of {SQUARE**2}; got {self.patches}.")
        if self.batch < 1:
            raise ValueError(f"blocks.batch must be at least 1; got {self.batch}.")
        for name in ("tile_damage", "slide_damage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"blocks.{name} must lie in 0..1, a share; got {getattr(self, name)}.")


@dataclass(frozen=True)
class PrepareConfig:
    """Everything the preparation needs, as stored in config.yaml."""

    slides: str = ""
    """Folder of slides or pictures, with its sub-folders."""
    out: str = "runs/prepared"
    """Folder of the prepared set; what it holds already is not made again."""
    import_from: str | None = None
    """Instead of slides: folder of a set in the published per-file form, which is taken over into `out`."""
    export_to: str | None = None
    """Instead of slides: folder to write the prepared set `out` to, in the published per-file form."""
    domain: Literal["brca", "naip"] = "brca"
    """brca: H&E slides, 20x (0.5 µm/px) to 0.15625x. naip: pictures from above, 1x (1 m/px) to 4x; all of a picture
    counts as tissue."""
    coarsest: str | None = None
    """Last magnification to prepare; None is the coarsest of the domain. 1.25x for the embedded demo model."""
    min_tissue: float = 0.25
    """A patch is kept when at least this share of it is tissue."""
    stride_cells: int | None = None
    """Largest distance between patches, in base cells: coarser patches overlap, so that few slides give many. None:
    patches lie side by side."""
    keep_images: bool = False
    """Keep the pixels too (196 KB per patch), to train an autoencoder on."""
    mpp: float | None = None
    """µm/px of files that state none; None refuses them, but for naip, where it is 1e6 (1 m/px)."""
    series: int | None = None
    """Number of the picture to read, of slides whose file holds several, counted from 0 as the report lists
    them; None is the largest that is no label, macro or overview. A slide without such a picture fails."""
    overrides: str | None = None
    """CSV with slide,mpp or slide,mpp_x,mpp_y: µm/px that count more than what the files say."""
    tissue: str | None = None
    """Folder of SLIDE.geojson to take the tissue from; a slide without a file there fails. None finds the tissue."""
    synthetic: bool = False
    """True notes that the slides are generated."""
    finder: TissueConfig = field(default_factory=TissueConfig)
    blocks: PrepareBlocks = field(default_factory=PrepareBlocks)
    model: ModelConfigSection = field(default_factory=ModelConfigSection)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        given = [name for name in ("slides", "import_from", "export_to") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"one of slides, import_from and export_to must be given; got {' and '.join(given) or 'none'}."
            )
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"min_tissue must lie in 0..1, a share of the patch; got {self.min_tissue}.")
        if self.stride_cells is not None and self.stride_cells < 1:
            raise ValueError(f"stride_cells must be at least 1 (base cells); got {self.stride_cells}.")
        if self.mpp is not None and not self.mpp > 0:
            raise ValueError(f"mpp must be positive (µm/px); got {self.mpp}. 20x is about 0.5, 1 m/px is 1e6.")
        if self.coarsest is not None and self.coarsest not in self._domain_scale.names:
            raise ValueError(f"coarsest must be one of {', '.join(self._domain_scale.names)}; got {self.coarsest!r}.")

    @property
    def _domain_scale(self) -> MagnificationScale:
        return BRCA_SCALE if self.domain == "brca" else NAIP_SCALE

    @property
    def scale(self) -> MagnificationScale:
        """The magnifications to prepare, base first."""
        whole = self._domain_scale
        last = len(whole.names) if self.coarsest is None else whole.index(self.coarsest) + 1
        return MagnificationScale(whole.names[:last], whole.base_mpp)

    @property
    def everything(self) -> bool:
        """Whether all of a slide counts as tissue."""
        return self.domain == "naip" or self.finder.method == "everything"

    @property
    def default_mpp(self) -> float | None:
        """µm/px of files that state none."""
        return self.scale.base_mpp if self.mpp is None and self.domain == "naip" else self.mpp

    def stride(self, factor: int) -> int:
        """Return the distance between patches at a factor, in base cells."""
        return factor if self.stride_cells is None else min(factor, self.stride_cells)

    def settings(self) -> dict[str, Any]:
        """Return the keys that decide what is prepared, dotted; dataset.json has those of the networks."""
        names = ("min_tissue", "stride_cells", "keep_images", "synthetic")
        model = {f"model.{k}": getattr(self.model, k) for k in ("dtype", "channels_last", "threads")}
        finder = {f"finder.{k}": v for k, v in asdict(self.finder).items()}
        return {name: getattr(self, name) for name in names} | model | finder | {
            "blocks.batch": self.blocks.batch,
            "blocks.tile_damage": self.blocks.tile_damage,
        }  # fmt: skip
