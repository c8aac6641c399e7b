"""Configuration of a run: one frozen dataclass per YAML section, valid by construction.

It knows ranges and units, not models or files. Keys map 1:1 to fields and to command-line flags.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, Literal, cast
from urllib.parse import urlsplit

from engine.core.config import ModelConfigSection, RayConfig, require
from engine.core.units import TILE_LATENT_PX, TILE_PX
from engine.sampling.schedule import Solver

START, END = 950, 50
"""First and last timestep (published)."""
DRAWN_T = 300
"""Begun from a picture at this timestep or below, a canvas has that picture's nuclei; above it, nuclei of its own."""
WHOLE_BACK_PROJECTION, INVISIBLE_LEVELS = 255, 8
"""Grey levels of 255: no bound, and what shows no outline beside drawn nuclei (results/super_resolution)."""


@dataclass(frozen=True)
class InversionConfig:
    """Condition inversion: the SSL grid under a picture of low magnification, found by Adam through the denoiser."""

    steps: int = 200
    """Steps of Adam, at timesteps from 950 down to 50."""
    lr: float = 0.1
    """Its step size; SSL vectors start with a deviation of 1."""
    variety: float = 0.05
    """Weight of the mean cosine between a window's cells, which is pushed down."""
    overlap: float = 0.5
    """Share of a window that the next one sees too, 0..0.9; matters to pictures larger than one tile."""
    start: Literal["noise", "enlarged"] = "noise"
    """Where the vectors begin: noise, as published, or what the model's encoder says of the enlarged picture."""
    batch_size: int = 4
    """Windows evaluated together; changes the last bits."""

    def __post_init__(self) -> None:
        for name, low in (("steps", 2), ("batch_size", 1), ("variety", 0), ("overlap", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"inversion.{name} must be at least {low}; got {getattr(self, name)}.")
        if not self.lr > 0:
            raise ValueError(f"inversion.lr must be positive; got {self.lr}.")
        if self.overlap > 0.9:
            raise ValueError(f"inversion.overlap must be at most 0.9; got {self.overlap}.")

    @property
    def timesteps(self) -> list[int]:
        """Return the timestep of each step, evenly spaced."""
        return [round(START - i * (START - END) / (self.steps - 1)) for i in range(self.steps)]


TileWeights = Literal["uniform", "smooth"]


GuidanceMethod = Literal["newton", "linear", "none"]


Condition = Literal["reference", "inversion", "cdm"]


ExportFormat = Literal["tiff", "ome-tiff", "dzi", "png"]


STORES = ("s3", "gs", "az", "file")
"""Schemes of canvas.store."""


@dataclass(frozen=True)
class CanvasConfig:
    """Size of the picture in px at the finest level."""

    height: int = 1024
    """Height in px, at least 256."""
    width: int = 1024
    """Width in px, at least 256."""
    levels: tuple[str, ...] | None = None
    """Magnifications from coarse to fine, e.g. [1.25x, 20x]; None picks those whose coarsest tile sees the canvas."""
    store: str | None = None
    """Where the latents and the state lie instead of output.folder: s3://bucket/prefix, gs://, az:// or file:///folder.
    Credentials come from the environment."""

    def __post_init__(self) -> None:
        for name, size in (("height", self.height), ("width", self.width)):
            require(size >= TILE_PX, f"canvas.{name} must be at least {TILE_PX} px", size)
        if self.store is not None:
            _check_store(self.store)


def _check_store(url: str) -> None:
    """Hold a URL to bucket and prefix; what may be a secret is not repeated."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "canvas.store must be a bucket and a prefix alone, because it is written to config.yaml; got a user, a key "
            "or a query too. Leave them out and put credentials into the environment."
        )
    require(parts.scheme in STORES, f"canvas.store must begin with one of {', '.join(s + '://' for s in STORES)}", url)
    absolute = parts.path.startswith("/") and not parts.netloc if parts.scheme == "file" else bool(parts.netloc)
    require(absolute, "canvas.store must be scheme://bucket/prefix or file:///absolute/folder", url)


@dataclass(frozen=True)
class SamplingConfig:
    """The joint sampling of all levels."""

    seed: int = 0
    """Seed of all noise."""
    start: int = 1000
    """First timestep, 1..1000; 1000 starts from pure noise, less from the guide if one is given."""
    from_guide: int | None = None
    """Timestep at which finer levels begin, from the finished picture of the next coarser one, enlarged, encoded and
    noised to it; 0 samples all levels jointly from `start`, as published. None takes, where the guide is sampled, 600
    if no level is over 4 times as fine as its guide, else 700."""
    stride: int = 50
    """Timesteps between two steps; 50 gives 20 steps."""
    solver: Solver = "ddim"
    """ddim is the published update; dpmpp_2m is of second order and keeps x0 of the last step on the canvas, too."""
    weight: float = 2.0
    """Classifier-free guidance w in (1+w)·eps_cond − w·eps_null; 0 skips the null call."""
    weight_from: int = 1000
    """First timestep of the null call; outside weight_from..weight_to w is 0."""
    weight_to: int = 1
    """Last timestep of the null call."""
    tile_stride: int = 48
    """Distance between tiles in latent px; 64 = no overlap."""
    tile_weights: TileWeights = "smooth"
    """How overlapping predictions are averaged."""
    last_step_clean: bool = False
    """True ends at abar = 1 without noise (the predecessor's recipe)."""
    batch_size: int = 4
    """Tiles evaluated together; part of the plan, because it changes the last bits."""

    def __post_init__(self) -> None:
        require(1 <= self.start <= 1000, "sampling.start must lie in 1..1000", self.start)
        require(self.from_guide is None or 0 <= self.from_guide <= 1000,
                 "sampling.from_guide must lie in 0..1000", self.from_guide)  # fmt: skip
        require(1 <= self.stride <= self.start, "sampling.stride must lie in 1..start", self.stride)
        require(self.weight >= 0, "sampling.weight must be 0 or more", self.weight)
        require(1000 >= self.weight_from >= self.weight_to >= 1,
                 "sampling must satisfy 1000 >= weight_from >= weight_to >= 1",
                 (self.weight_from, self.weight_to))  # fmt: skip
        require(1 <= self.tile_stride <= TILE_LATENT_PX,
                 f"sampling.tile_stride must lie in 1..{TILE_LATENT_PX} latent px", self.tile_stride)  # fmt: skip
        require(self.batch_size >= 1, "sampling.batch_size must be at least 1", self.batch_size)
        require(0 <= self.seed < 2**63, "sampling.seed must lie in 0..2**63-1", self.seed)


@dataclass(frozen=True)
class GuidanceConfig:
    """How a coarser level steers the next finer one."""

    method: GuidanceMethod = "linear"
    """newton is the published correction; none lets the levels run side by side."""
    from_t: int = 1000
    """First guided timestep."""
    to_t: int = 300
    """Last guided timestep; below 300 cells are drawn already, and steering would paint over them."""
    corrections: int = 10
    """newton: corrections per step."""
    step: float = 0.005
    """newton: finite-difference step h."""
    lr: float = 0.5
    """newton: step size along the direction."""
    strength: float = 0.2
    """linear: share of the colour error corrected per step, 0..1."""
    damping: float = 0.1
    """linear: damping of the inverse, in units of the mean eigenvalue."""
    cell: int = 16
    """linear: latent px of a steered cell on each axis at least, a power of two up to 64. At 1 every latent px
    is pulled to the guide's blur (docs/explanation/guidance.md)."""
    back_projection: int | None = None
    """A given guide: how far the finished picture may be moved onto each of its px, in grey levels, 0..255. None: as
    far as it takes where the canvas begins at t = 300 or below, else 8: more shows as outlines beside drawn nuclei."""

    def __post_init__(self) -> None:
        require(1000 >= self.from_t >= self.to_t >= 1,
                 "guidance must satisfy 1000 >= from_t >= to_t >= 1", (self.from_t, self.to_t))  # fmt: skip
        require(self.corrections >= 1, "guidance.corrections must be at least 1", self.corrections)
        require(self.step > 0, "guidance.step must be positive", self.step)
        require(self.lr > 0, "guidance.lr must be positive", self.lr)
        require(0 <= self.strength <= 1, "guidance.strength must lie in 0..1", self.strength)
        require(self.damping > 0, "guidance.damping must be positive", self.damping)
        require(self.cell in (1, 2, 4, 8, 16, 32, 64), "guidance.cell must be a power of two up to 64", self.cell)
        require(self.back_projection is None or 0 <= self.back_projection <= 255,
                 "guidance.back_projection must lie in 0..255", self.back_projection)  # fmt: skip

    def covers(self, t: int) -> bool:
        """Say whether timestep t is guided."""
        return self.method != "none" and self.from_t >= t >= self.to_t

    def settled(self, start: int) -> "GuidanceConfig":
        """Return it with the back-projection of a canvas that begins from a given guide at timestep `start`."""
        if self.back_projection is not None:
            return self
        within = WHOLE_BACK_PROJECTION if start <= DRAWN_T else INVISIBLE_LEVELS
        return replace(self, back_projection=0 if self.method == "none" else within)


@dataclass(frozen=True)
class RefineConfig:
    """The published seam removal: re-noise, then densely overlapping tiles. start = 0 leaves it out."""

    start: int = 0
    """Timestep to re-noise to (300 in the published recipe); 0 = no refinement."""
    stride: int = 50
    """Timesteps between two steps."""
    tile_stride: int = 16
    """Distance between tiles in latent px."""
    tile_weights: TileWeights = "uniform"
    """How overlapping predictions are averaged."""
    weight: float = 2.0
    """Classifier-free guidance w."""

    def __post_init__(self) -> None:
        require(0 <= self.start <= 1000, "refine.start must lie in 0..1000", self.start)
        require(self.stride >= 1 and (self.start == 0 or self.stride <= self.start),
                 "refine.stride must lie in 1..start", self.stride)  # fmt: skip
        require(1 <= self.tile_stride <= TILE_LATENT_PX,
                 f"refine.tile_stride must lie in 1..{TILE_LATENT_PX} latent px", self.tile_stride)  # fmt: skip
        require(self.weight >= 0, "refine.weight must be 0 or more", self.weight)


@dataclass(frozen=True)
class DecodeConfig:
    """From latents to pixels."""

    tile_stride: int = 32
    """Distance between decoded windows in latent px; 16 in the published recipe. The decoder normalises over a window,
    so windows differ in tint: at 48 glass beside tissue shows them as rectangles, at 32 the tint changes gradually."""
    sigma: float = 0.4
    """Width of the Gaussian window weight, in half-widths of the window. The published 0.8 goes with its stride of 16:
    at the edge of a window it still weighs 0.21, which shows as a grid of fine lines (0.4: 0.002)."""
    batch_size: int = 4
    """Windows decoded together."""

    def __post_init__(self) -> None:
        require(1 <= self.tile_stride <= TILE_LATENT_PX,
                 f"decode.tile_stride must lie in 1..{TILE_LATENT_PX} latent px", self.tile_stride)  # fmt: skip
        require(self.sigma > 0, "decode.sigma must be positive", self.sigma)
        require(self.batch_size >= 1, "decode.batch_size must be at least 1", self.batch_size)


@dataclass(frozen=True)
class OutputConfig:
    """Where the run lives and what it exports besides OME-Zarr, preview and report."""

    folder: str = "runs/latest"
    """Run folder; a matching unfinished run in it is continued."""
    formats: tuple[ExportFormat, ...] = ("tiff",)
    """Exports: tiff (pyramidal BigTIFF), ome-tiff, dzi (Deep Zoom), png (the whole canvas, up to 16384 px)."""
    tiff_compression: Literal["jpeg", "deflate"] = "deflate"
    """deflate keeps the pixels; jpeg is smaller."""
    jpeg_quality: int = 90
    """JPEG quality of TIFF and Deep Zoom, 1..100."""

    def __post_init__(self) -> None:
        require(1 <= self.jpeg_quality <= 100, "output.jpeg_quality must lie in 1..100", self.jpeg_quality)


@dataclass(frozen=True)
class RunConfig:
    """Everything command 1 needs, as stored in config.yaml.

    >>> import engine
    >>> engine.RunConfig().canvas.height, engine.RunConfig(cdm_steps=50).cdm_steps
    (1024, 50)
    """

    RETIRED: ClassVar[dict[str, str]] = {
        "guidance.iterations": "it belonged to guidance.method=probe, which is gone; use linear",
        "output.record_writers": "the fault suite records writers by itself",
    }
    """Keys of earlier releases that are read for one more release, and ignored: key → why."""

    model: ModelConfigSection = field(default_factory=ModelConfigSection)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    inversion: InversionConfig = field(default_factory=InversionConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    reference: str | None = None
    """Picture whose SSL grid conditions the run (at the base magnification)."""
    embeddings: str | None = None
    """Stored SSL grid: .npy, .h5 or .zarr, (D, h, w) or (h·w, D)."""
    text: str | None = None
    """What the picture shows, in words: a text prior draws the SSL grid."""
    text_map: str | None = None
    """Boxes with texts of their own (YAML), or QuPath's annotations (GeoJSON: class = text), in px of the canvas."""
    negative_text: str | None = None
    """What the picture does not show."""
    text_weight: float = 2.0
    """Classifier-free guidance w of the text prior; 0 = as it was learned."""
    text_steps: int = 50
    """Steps of the text prior, 2..1000."""
    condition: Condition = "reference"
    """Where the SSL grid comes from: reference, embeddings or the demo's own; inversion of the guide; or a picture that
    the model's CDM dreams up, which needs nothing."""
    cdm_steps: int = 200
    """condition=cdm: steps of its sampling, 2..1000."""
    guide: str | None = None
    """Picture at canvas.levels[0] that steers as it is, instead of being sampled (engine.superres sets it)."""

    def __post_init__(self) -> None:
        words = self.text if self.text is not None else self.text_map
        given, by = [v for v in (self.reference, self.embeddings, words) if v is not None], self.condition
        require(len(given) < 2, "reference, embeddings and text exclude each other", given)
        require(
            by == "reference" or not given, f"condition {by} takes neither reference nor embeddings nor text", given
        )
        require(self.text is None or self.text.strip() != "", "text must say something", self.text)
        require(self.negative_text is None or words is not None, "negative_text goes with text or text_map", None)
        require(self.text_weight >= 0, "text_weight must be 0 or more", self.text_weight)
        require(2 <= self.text_steps <= 1000, "text_steps must be at least 2 and at most 1000", self.text_steps)
        require(by != "inversion" or self.guide is not None, "condition=inversion needs a guide to invert", self.guide,
                 "Use python -m engine.superres.")  # fmt: skip
        require(by != "cdm" or not self.guide, "condition=cdm makes a guide of its own", self.guide)
        require(2 <= self.cdm_steps <= 1000, "cdm_steps must be at least 2 and at most 1000", self.cdm_steps)
        require(not self.guide or len(self.canvas.levels or ()) > 1,
                 "a guide needs canvas.levels, its own magnification first", self.canvas.levels,
                 "Use python -m engine.superres, which sets them.")  # fmt: skip

    def picture_keys(self) -> dict[str, object]:
        """Return the keys that decide the picture's bytes, dotted; the rest may change on resume."""
        unused = {"ray", "output", "guide"}  # what a guide shows counts, with the conditions
        unused |= {"inversion", "condition"} if self.condition == "reference" else set()
        unused |= {"cdm_steps"} if self.condition != "cdm" else set()
        if self.text is None and self.text_map is None:
            unused |= {"text", "text_map", "negative_text", "text_weight", "text_steps"}
        kept = {k: v for k, v in asdict(self).items() if k not in unused}
        flat: dict[str, object] = {}
        for section, values in kept.items():
            if isinstance(values, dict):
                flat |= {f"{section}.{k}": v for k, v in cast("dict[str, object]", values).items()}
            else:
                flat[section] = values
        if self.guide is None:
            del flat["guidance.back_projection"]
        return flat
