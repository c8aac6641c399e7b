"""Configuration of command 1: one frozen dataclass per YAML section, valid by construction.

It knows ranges and units, not models or files. Keys map 1:1 to fields and to command-line flags.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from engine.inversion_config import InversionConfig
from engine.magnification import TILE_LATENT_PX, TILE_PX
from engine.schedule import Solver

TileWeights = Literal["uniform", "smooth"]
GuidanceMethod = Literal["newton", "linear", "probe", "none"]
Condition = Literal["reference", "inversion", "cdm"]
ExportFormat = Literal["tiff", "ome-tiff", "dzi", "png"]
STORES = ("s3", "gs", "az", "file")
"""Schemes of canvas.store."""


def _require(ok: bool, rule: str, came: object, do: str = "") -> None:
    if not ok:
        raise ValueError(f"{rule}; got {came!r}.{' ' + do if do else ''}")


@dataclass(frozen=True)
class ModelConfigSection:
    """Which weights, on which kind of device, in which arithmetic."""

    source: str = "demo"
    """"demo", a Hub id such as StonyBrook-CVLab/ZoomLDM, or a folder (LDM layout or ours)."""
    variant: str | None = None
    """Sub-folder of the source: brca or naip for the published weights."""
    encoder_source: str | None = None
    """Folder or Hub id of the SSL encoder; None takes the one the model was trained with."""
    cdm_source: str | None = None
    """Folder or published file of the CDM, for condition cdm; None takes the one in the model's folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where replicas compute; auto takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Arithmetic of the networks; the canvas is always float32. auto takes bfloat16 where the hardware multiplies it,
    else float32 (float16 on older GPUs), and keeps what a run began with."""
    channels_last: bool = True
    """Memory format of the convolutions; changes the last bits, so it is pinned with the run."""
    threads: int = 1
    """CPU threads of each replica; pinned, because it changes the last bits."""

    def __post_init__(self) -> None:
        _require(self.threads >= 1, "model.threads must be at least 1", self.threads)


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
            _require(size >= TILE_PX, f"canvas.{name} must be at least {TILE_PX} px", size)
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
    _require(parts.scheme in STORES, f"canvas.store must begin with one of {', '.join(s + '://' for s in STORES)}", url)
    absolute = parts.path.startswith("/") and not parts.netloc if parts.scheme == "file" else bool(parts.netloc)
    _require(absolute, "canvas.store must be scheme://bucket/prefix or file:///absolute/folder", url)


@dataclass(frozen=True)
class SamplingConfig:
    """The joint sampling of all levels."""

    seed: int = 0
    """Seed of all noise."""
    start: int = 1000
    """First timestep, 1..1000; 1000 starts from pure noise, less from the guide if one is given."""
    from_guide: int | None = None
    """Timestep at which finer levels begin, from the finished picture of the next coarser one, enlarged, encoded and
    noised to it; 0 samples all levels jointly from `start`, as published; None takes 600 where the guide is sampled."""
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
        _require(1 <= self.start <= 1000, "sampling.start must lie in 1..1000", self.start)
        _require(self.from_guide is None or 0 <= self.from_guide <= 1000,
                 "sampling.from_guide must lie in 0..1000", self.from_guide)  # fmt: skip
        _require(1 <= self.stride <= self.start, "sampling.stride must lie in 1..start", self.stride)
        _require(self.weight >= 0, "sampling.weight must be 0 or more", self.weight)
        _require(1000 >= self.weight_from >= self.weight_to >= 1,
                 "sampling must satisfy 1000 >= weight_from >= weight_to >= 1",
                 (self.weight_from, self.weight_to))  # fmt: skip
        _require(1 <= self.tile_stride <= TILE_LATENT_PX,
                 f"sampling.tile_stride must lie in 1..{TILE_LATENT_PX} latent px", self.tile_stride)  # fmt: skip
        _require(self.batch_size >= 1, "sampling.batch_size must be at least 1", self.batch_size)
        _require(0 <= self.seed < 2**63, "sampling.seed must lie in 0..2**63-1", self.seed)


@dataclass(frozen=True)
class GuidanceConfig:
    """How a coarser level steers the next finer one."""

    method: GuidanceMethod = "linear"
    """newton is the published correction; none lets the levels run side by side."""
    from_t: int = 1000
    """First guided timestep."""
    to_t: int = 1
    """Last guided timestep."""
    corrections: int = 10
    """newton: corrections per step."""
    step: float = 0.005
    """newton: finite-difference step h."""
    lr: float = 0.5
    """newton: step size along the direction."""
    strength: float = 1.0
    """linear, probe: share of the colour error corrected per step, 0..1."""
    damping: float = 0.1
    """linear: damping of the inverse, in units of the mean eigenvalue."""
    cell: int = 1
    """linear, probe: latent px of a steered cell on each axis at least, a power of two up to 64. At 1 every latent px
    is pulled to the guide's blur (docs/guidance.md)."""
    iterations: int = 20
    """probe: Adam steps per timestep."""

    def __post_init__(self) -> None:
        _require(1000 >= self.from_t >= self.to_t >= 1,
                 "guidance must satisfy 1000 >= from_t >= to_t >= 1", (self.from_t, self.to_t))  # fmt: skip
        _require(self.corrections >= 1, "guidance.corrections must be at least 1", self.corrections)
        _require(self.step > 0, "guidance.step must be positive", self.step)
        _require(self.lr > 0, "guidance.lr must be positive", self.lr)
        _require(0 <= self.strength <= 1, "guidance.strength must lie in 0..1", self.strength)
        _require(self.damping > 0, "guidance.damping must be positive", self.damping)
        _require(self.cell in (1, 2, 4, 8, 16, 32, 64), "guidance.cell must be a power of two up to 64", self.cell)
        _require(self.iterations >= 1, "guidance.iterations must be at least 1", self.iterations)

    def covers(self, t: int) -> bool:
        """Say whether timestep t is guided."""
        return self.method != "none" and self.from_t >= t >= self.to_t


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
        _require(0 <= self.start <= 1000, "refine.start must lie in 0..1000", self.start)
        _require(self.stride >= 1 and (self.start == 0 or self.stride <= self.start),
                 "refine.stride must lie in 1..start", self.stride)  # fmt: skip
        _require(1 <= self.tile_stride <= TILE_LATENT_PX,
                 f"refine.tile_stride must lie in 1..{TILE_LATENT_PX} latent px", self.tile_stride)  # fmt: skip
        _require(self.weight >= 0, "refine.weight must be 0 or more", self.weight)


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
        _require(1 <= self.tile_stride <= TILE_LATENT_PX,
                 f"decode.tile_stride must lie in 1..{TILE_LATENT_PX} latent px", self.tile_stride)  # fmt: skip
        _require(self.sigma > 0, "decode.sigma must be positive", self.sigma)
        _require(self.batch_size >= 1, "decode.batch_size must be at least 1", self.batch_size)


@dataclass(frozen=True)
class RayConfig:
    """Replicas and patience. None of these keys changes a byte of the picture."""

    enabled: bool = True
    """False computes in this process, without Ray."""
    address: str | None = None
    """Address of a running cluster; None starts or joins one as Ray would."""
    replicas: int | None = None
    """Model replicas; None takes every GPU, or one replica on CPUs."""
    gpus_per_replica: float = 1.0
    """GPU share of a replica when computing on GPUs."""
    in_flight: int = 2
    """Batches queued per replica."""
    batch_timeout_s: float = 600.0
    """A batch that takes longer counts as lost, and its replica is replaced."""
    start_timeout_s: float = 300.0
    """Patience for the first replica to be ready."""
    max_attempts: int = 4
    """Evaluations of one batch before the run stops."""

    def __post_init__(self) -> None:
        _require(self.replicas is None or self.replicas >= 1, "ray.replicas must be at least 1", self.replicas)
        _require(self.gpus_per_replica > 0, "ray.gpus_per_replica must be positive", self.gpus_per_replica)
        _require(self.in_flight >= 1, "ray.in_flight must be at least 1", self.in_flight)
        _require(self.batch_timeout_s > 0, "ray.batch_timeout_s must be positive", self.batch_timeout_s)
        _require(self.start_timeout_s > 0, "ray.start_timeout_s must be positive", self.start_timeout_s)
        _require(self.max_attempts >= 1, "ray.max_attempts must be at least 1", self.max_attempts)


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
    record_writers: bool = False
    """Debugging: note the writer of every chunk of the canvas in writers/, and stop at a second one within a step."""

    def __post_init__(self) -> None:
        _require(1 <= self.jpeg_quality <= 100, "output.jpeg_quality must lie in 1..100", self.jpeg_quality)


@dataclass(frozen=True)
class RunConfig:
    """Everything command 1 needs, as stored in config.yaml."""

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
    condition: Condition = "reference"
    """Where the SSL grid comes from: reference, embeddings or the demo's own; inversion of the guide; or a picture that
    the model's CDM dreams up, which needs nothing."""
    cdm_steps: int = 200
    """condition=cdm: steps of its sampling, 2..1000."""
    guide: str | None = None
    """Picture at canvas.levels[0] that steers as it is, instead of being sampled (engine.superres sets it)."""

    def __post_init__(self) -> None:
        given, by = self.reference or self.embeddings, self.condition
        _require(not (self.reference and self.embeddings), "reference and embeddings exclude each other", "both")
        _require(by == "reference" or not given, f"condition {by} takes neither reference nor embeddings", given)
        _require(by != "inversion" or self.guide is not None, "condition=inversion needs a guide to invert", self.guide,
                 "Use python -m engine.superres.")  # fmt: skip
        _require(by != "cdm" or not self.guide, "condition=cdm makes a guide of its own", self.guide)
        _require(2 <= self.cdm_steps <= 1000, "cdm_steps must be at least 2 and at most 1000", self.cdm_steps)
        _require(not self.guide or len(self.canvas.levels or ()) > 1,
                 "a guide needs canvas.levels, its own magnification first", self.canvas.levels,
                 "Use python -m engine.superres, which sets them.")  # fmt: skip

    def picture_keys(self) -> dict[str, object]:
        """Return the keys that decide the picture's bytes, dotted; the rest may change on resume."""
        unused = {"ray", "output", "guide"}  # what a guide shows counts, with the conditions
        unused |= {"inversion", "condition"} if self.condition == "reference" else set()
        unused |= {"cdm_steps"} if self.condition != "cdm" else set()
        kept = {k: v for k, v in asdict(self).items() if k not in unused}
        flat: dict[str, object] = {}
        for section, values in kept.items():
            if isinstance(values, dict):
                flat |= {f"{section}.{k}": v for k, v in values.items()}
            else:
                flat[section] = values
        return flat
