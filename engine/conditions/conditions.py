"""What a run is conditioned on: the SSL grid of its base cells, from wherever, and a guide if one is given.

The grid is kept in the run folder, so that a resume neither needs the encoder nor depends on where it ran. It does not
know canvases.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from engine.canvas.storage import open_storage
from engine.conditions.inversion import Windows, encode_windows, invert
from engine.conditions.patch_sampler import PatchSampler
from engine.conditions.reference import cover_canvas, embedding_grid, fit_grid, read_embeddings, read_reference
from engine.core.errors import CanvasError, EngineError
from engine.core.files import replacing
from engine.core.progress import Progress
from engine.core.runtime import torch_dtype
from engine.core.units import LATENT_FACTOR, TILE_LATENT_PX, TILE_PX
from engine.model.cdm_sampler import sample_summaries
from engine.model.encoders.registry import load_encoder
from engine.model.weights.cdm import load_cdm
from engine.model.weights.folder import hash_tensors
from engine.model.weights.hub import DEMO
from engine.model.zoomldm import ZoomLDM
from engine.sampling.back_projection import GuideWindows
from engine.sampling.config import RunConfig
from engine.sampling.guidance import GuidePicture
from engine.sampling.pixels import to_uint8
from engine.sampling.plan import Plan

STORED = "conditions.npy"
DEMO_GRID = DEMO / "reference.safetensors"
SAID_OF_TEXT = ("text_tower", "text_prior", "text_regions")
"""What pictures that were asked for in words say beside their configuration: tower, digest of the prior, texts."""
DREAM_STEPS = 50
"""Steps of the picture that a CDM's summary is turned into."""

Make = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Conditions:
    """The SSL vectors of the base cells, float32 (D, h, w), and the sha256 of where all conditions come from."""

    grid: np.ndarray
    digest: str
    guide: GuidePicture | None = None
    """The picture that a user gives as coarsest level."""
    said: Mapping[str, object] = field(default_factory=dict)
    """What pictures say of their conditions, beside the configuration."""


def find_conditions(config: RunConfig, model: ZoomLDM, plan: Plan, device: str, progress: Progress) -> Conditions:
    """Read or compute what a run is conditioned on; `device` is where this process asks networks.

    Raises: EngineError when there is no condition, or it is unreadable or does not fit; CheckpointError when the
    encoder cannot be had.
    """
    try:
        if config.condition == "cdm":
            return _from_cdm(config, model, plan, device, progress)
        if config.guide is None:
            return _find_grid(config, model, plan, device, progress)
        picture = read_given_guide(config.guide, plan)
        level = plan.levels[0]
        guide = _as_image(picture, (level.height * LATENT_FACTOR, level.width * LATENT_FACTOR))
        given = GuidePicture(guide, level.factor // plan.levels[1].factor)
        if config.condition == "inversion":
            return replace(_from_guide(config, picture, model, plan, device, progress), guide=given)
        found = _find_grid(config, model, plan, device, progress)
        return replace(found, digest=_sha256(found.digest.encode(), picture), guide=given)
    except (ValueError, FileNotFoundError) as error:
        raise EngineError(str(error)) from error


def _find_grid(config: RunConfig, model: ZoomLDM, plan: Plan, device: str, progress: Progress) -> Conditions:
    dim = model.config.ssl_dim
    if config.embeddings is not None:
        grid = read_embeddings(config.embeddings, plan.grid_shape)
        return _digested(fit_grid(grid, *plan.grid_shape, dim, config.embeddings))
    if config.reference is not None:
        return _from_picture(config, config.reference, model, plan, device, progress)
    if config.text is not None or config.text_map is not None:
        from engine.conditions.text import text_source  # few runs ask in words, and its imports take time

        asked = text_source(config, model, plan, device, progress)
        said = dict(zip(SAID_OF_TEXT, asked.said, strict=True))
        return replace(_kept_or(config, _sha256(asked.decides), asked.draw), said=said)
    if config.model.source == "demo":
        grid = load_file(DEMO_GRID)["grid"].numpy()
        return _digested(cover_canvas(grid, *plan.grid_shape, dim, str(DEMO_GRID)))
    h, w = plan.grid_shape
    raise EngineError(
        "A run must be conditioned on something; neither a reference nor embeddings nor a text is given. Pass "
        f"--reference PICTURE (at {model.config.base_mpp:g} µm/px), --embeddings FILE with {h} x {w} vectors of {dim} "
        f"({model.config.encoder}) or, where the model carries a text prior, --text WORDS."
    )


def keep_conditions(folder: Path, conditions: Conditions) -> None:
    """Store the grid in the run folder, once."""
    if not (folder / STORED).exists():
        with replacing(folder / STORED) as partial, partial.open("wb") as file:
            np.save(file, conditions.grid)


def read_given_guide(path: str, plan: Plan) -> np.ndarray:
    """Read a picture that is the whole canvas at its coarsest level: uint8 (h, w, 3). Raises ValueError."""
    level = plan.levels[0]
    h, w = (-(-side // level.factor) for side in plan.size_px)
    picture = read_reference(path, "guide", TILE_PX // level.factor)
    if picture.shape[:2] != (h, w):
        raise ValueError(
            f"a guide at {level.name} must have the canvas's size there, {h} x {w} px (h x w); {path} is "
            f"{picture.shape[0]} x {picture.shape[1]}. Use python -m engine.superres, which fits the canvas to it."
        )
    return picture


def _from_picture(
    config: RunConfig, reference: str, model: ZoomLDM, plan: Plan, device: str, progress: Progress
) -> Conditions:
    """Embed a picture, or take what an earlier start of the same run kept."""
    picture = read_reference(reference)

    def embed() -> np.ndarray:
        dtype = torch_dtype(config.model.dtype)
        encoder = load_encoder(model.config.encoder, config.model.encoder_source, model.extras, device, dtype)
        grid = embedding_grid(picture, encoder)
        return _covering(grid, plan, model.config.ssl_dim, reference, progress)

    return _kept_or(config, _sha256(picture, str(plan.grid_shape).encode()), embed)


def _covering(grid: np.ndarray, plan: Plan, dim: int, source: str, progress: Progress) -> np.ndarray:
    """Fit a picture's grid to the canvas, and tell the user where that repeats or drops a part of it."""
    h, w = plan.grid_shape
    if grid.shape[1:] != (h, w):
        progress.say(
            f"{source} covers {grid.shape[1]} x {grid.shape[2]} cells, the canvas {h} x {w}: what is too much is left "
            "out, what is missing is mirrored."
        )
    return cover_canvas(grid, h, w, dim, source)


def _from_guide(
    config: RunConfig, picture: np.ndarray, model: ZoomLDM, plan: Plan, device: str, progress: Progress
) -> Conditions:
    """Recover the grid under a guide, or take what an earlier start of the same run kept."""

    def recover() -> np.ndarray:
        with _asked(model, device):
            return _recovered(config, picture, model, plan, progress)

    return _kept_or(config, _sha256(picture, f"inversion/{plan.grid_shape}".encode()), recover)


def _from_cdm(config: RunConfig, model: ZoomLDM, plan: Plan, device: str, progress: Progress) -> Conditions:
    """Draw a summary and a picture of it at the coarsest magnification, and recover the grid under that.

    One picture is one tile, so of a canvas that its coarsest tile does not see whole, the rest is mirrored.
    """
    section, seed, level = config.model, config.sampling.seed, plan.levels[0]
    cdm = load_cdm(section.source, section.variant, section.cdm_source, device)

    def dream() -> np.ndarray:
        progress.say(f"drawing a summary and its picture at {level.name}: the CDM takes {config.cdm_steps} steps")
        with _asked(model, device):
            summary = sample_summaries(cdm, level.index, 1, config.cdm_steps, seed)
            drawn = PatchSampler("ddim", DREAM_STEPS, 1 + config.sampling.weight, seed).draw_from(model, summary)[0]
            grid = _recovered(config, to_uint8(drawn).transpose(1, 2, 0), model, plan, progress)
        return _covering(grid, plan, model.config.ssl_dim, "the CDM's picture", progress)

    weights = hashlib.sha256()
    hash_tensors(weights, "cdm", cdm.state_dict())
    return _kept_or(config, _sha256(weights.digest(), f"cdm/{level.name}/{plan.grid_shape}".encode()), dream)


def _recovered(config: RunConfig, picture: np.ndarray, model: ZoomLDM, plan: Plan, progress: Progress) -> np.ndarray:
    """Return the SSL grid under a picture of the coarsest level, uint8 (h, w, 3): at most that under the canvas."""
    windows = Windows.over(picture.shape[:2], plan.levels[0], config.inversion)
    progress.say(f"condition inversion: {len(windows.tiling)} window(s), {config.inversion.steps} steps")
    latents = encode_windows(model, _as_image(picture, windows.size_px), windows)
    start = _vectors_of_enlarged(config, picture, model, windows) if config.inversion.start == "enlarged" else None
    try:
        grid = invert(
            model, latents, windows, config.inversion, config.sampling.seed,
            lambda done, total: progress.step("inversion", done, total), start,
        )  # fmt: skip
    finally:
        progress.close()
    return np.ascontiguousarray(grid[:, : plan.grid_shape[0], : plan.grid_shape[1]])


def _vectors_of_enlarged(config: RunConfig, picture: np.ndarray, model: ZoomLDM, windows: Windows) -> np.ndarray:
    """Return what the model's encoder says of the enlarged picture, float32 (D, *windows.shape).

    Raises: CheckpointError when the encoder cannot be had or returns NaN.
    """
    section, factor, n = config.model, windows.level.factor, windows.cells
    encoder = load_encoder(
        model.config.encoder, section.encoder_source, model.extras, model.device, torch_dtype(section.dtype)
    )
    guide = GuidePicture(_as_image(picture, windows.size_px), factor)
    rows, columns = (side * n for side in windows.shape)
    vectors = []
    for y in range(rows):  # a row of cells at a time: the enlarged picture may be too large to hold
        corners = [(y * TILE_LATENT_PX, x * TILE_LATENT_PX) for x in range(columns)]
        cells = [GuideWindows.of(guide, [corner]).enlarged()[0].numpy() for corner in corners]
        vectors.append(embedding_grid(np.concatenate(to_uint8(np.stack(cells)).transpose(0, 2, 3, 1), axis=1), encoder))
    grid = np.concatenate(vectors, axis=1)
    return grid.reshape(len(grid), rows // n, n, columns // n, n).mean(axis=(2, 4))


@contextmanager
def _asked(model: ZoomLDM, device: str) -> Iterator[None]:
    """Put the model where it is asked, and back."""
    before = model.device
    try:
        model.to(device)
        yield
    finally:
        model.to(before)


def _as_image(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return uint8 (h, w, 3) as float32 (3, *size) in [−1, 1], mirrored at its lower and right border to fill it.

    Half a grey level brighter, so that to_uint8, which truncates, gives it back.
    """
    missing = [(0, whole - side) for whole, side in zip(size, picture.shape, strict=False)]
    padded = np.pad(picture, (*missing, (0, 0)), mode="symmetric")
    return np.minimum((np.ascontiguousarray(padded.transpose(2, 0, 1), dtype=np.float32) + 0.5) / 127.5 - 1, 1)


def _kept_or(config: RunConfig, digest: str, make: Make) -> Conditions:
    """Return the grid of an earlier start of the run, or make it.

    state.json's keys hold the digest, so that what was kept for another picture is refused later.
    """
    kept = _kept_grid(config)
    return Conditions(make() if kept is None else kept, digest)


def _kept_grid(config: RunConfig) -> np.ndarray | None:
    """Return the grid of an earlier start of the run, from where its state lies."""
    if config.canvas.store is not None:
        data = open_storage(config.canvas.store).record(STORED)
        return None if data is None else _load_grid(io.BytesIO(data), f"{config.canvas.store}/records/{STORED}")
    stored = Path(config.output.folder) / STORED
    return stored_grid(stored) if stored.exists() and stored.with_name("state.json").exists() else None


def stored_grid(path: Path) -> np.ndarray:
    """Return the grid a run keeps, float32 (D, h, w). Raises CanvasError."""
    return _load_grid(path, str(path))


def _load_grid(file: Path | io.BytesIO, name: str) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CanvasError(
            f"{name} must hold this run's SSL grid; {error}. Remove it to make the grid again."
        ) from error


def _digested(grid: np.ndarray) -> Conditions:
    return Conditions(grid, _sha256(grid, str(grid.shape).encode()))


def _sha256(*parts: np.ndarray | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else part.tobytes())
    return found.hexdigest()
