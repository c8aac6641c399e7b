"""Single tiles drawn at one of the model's magnifications, beside the reference tiles they imitate."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.conditions.conditions import DEMO_GRID
from engine.conditions.patch_sampler import SCHEDULERS, PatchSampler
from engine.conditions.reference import embedding_grid, read_embeddings, read_reference
from engine.core.errors import EngineError
from engine.core.runtime import (
    choose_device,
    encoder_device,
    keep_freed_memory,
    pin_arithmetic,
    settle_dtype,
    this_process,
)
from engine.core.units import TILE_PX
from engine.generation.run import load_model
from engine.model.cdm_sampler import sample_summaries
from engine.model.encoders.registry import load_encoder
from engine.model.weights.cdm import load_cdm
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig
from engine.sampling.pixels import to_uint8

UNUSED = ("guidance", "refine", "decode", "inversion", "ray", "output")
"""Sections of a canvas's configuration that tiles do not use."""
_GAP_PX = 8


@dataclass(frozen=True)
class SampleConfig(RunConfig):
    """A canvas's keys, of which tiles do not use `UNUSED`, and what tiles need."""

    magnification: str | None = None
    """One of the model's magnifications; None takes the base."""
    count: int = 16
    """Patches to draw."""
    steps: int = 50
    """Steps of the scheduler."""
    scale: float = 2.0
    """Guidance scale s = 1 + w; 1 leaves the null call out."""
    scheduler: str = "ddim"
    """ddim, ddpm, dpmsolver++, euler or unipc, as diffusers implements them."""
    folder: str = "runs/patches"
    """Where the PNGs go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}; got {self.scheduler!r}.")
        for name, low in (("count", 1), ("steps", 1), ("scale", 1.0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}; got {getattr(self, name)}.")
        if self.condition == "inversion":
            raise ValueError("condition must be reference or cdm for patches; got 'inversion', which is for canvases.")


@dataclass(frozen=True)
class Source:
    """What patches imitate: a grid of base cells and, when there is one, the picture it was taken from."""

    grid: np.ndarray
    """float32 (D, h, w)."""
    picture: np.ndarray | None
    """uint8 (H, W, 3) at the base magnification."""

    def corners(self, factor: int, count: int) -> list[tuple[int, int]]:
        """Return `count` cell positions whose factor × factor cells lie inside, evenly spread, repeated if few.

        Raises: ValueError when the grid is smaller than one patch.
        """
        h, w = self.grid.shape[1] - factor + 1, self.grid.shape[2] - factor + 1
        if h < 1 or w < 1:
            raise ValueError(
                f"a patch at this magnification covers {factor} x {factor} cells; the source has "
                f"{self.grid.shape[1]} x {self.grid.shape[2]}. Take a finer magnification or a larger source."
            )
        return [divmod(i * h * w // count, w) for i in range(count)]

    def reference(self, y: int, x: int, factor: int) -> np.ndarray | None:
        """Return the picture under a patch, reduced to 256 × 256: uint8 (256, 256, 3)."""
        if self.picture is None:
            return None
        window = self.picture[y * TILE_PX : (y + factor) * TILE_PX, x * TILE_PX : (x + factor) * TILE_PX]
        image = PIL.Image.fromarray(window)
        return np.asarray(image.resize((TILE_PX, TILE_PX), PIL.Image.Resampling.BOX))


def read_source(config: SampleConfig, model: ZoomLDM) -> Source:
    """Read the grid that conditions the patches, and its picture. Raises EngineError when there is none."""
    try:
        if config.embeddings is not None:
            cells = -(-config.canvas.height // TILE_PX), -(-config.canvas.width // TILE_PX)
            return Source(read_embeddings(config.embeddings, cells), None)
        if config.reference is not None:
            picture = read_reference(config.reference)
            device = encoder_device(config.model)
            encoder = load_encoder(model.config.encoder, config.model.encoder_source, model.extras, device, model.dtype)
            return Source(embedding_grid(picture, encoder), picture)
    except ValueError as error:
        raise EngineError(str(error)) from error
    if config.model.source == "demo":
        return Source(load_file(DEMO_GRID)["grid"].numpy(), None)
    raise EngineError("Patches must be conditioned on something; pass --reference PICTURE or --embeddings FILE.")


def sample(config: SampleConfig) -> Path:
    """Draw the tiles, one PNG each; return the contact sheet, reference left and drawn right."""
    folder, pairs = Path(config.folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, image, reference in draw(config):
        PIL.Image.fromarray(image).save(folder / f"{name}_{len(pairs):04d}.png")
        pairs.append((reference, image))
    sheet = folder / "contact_sheet.png"
    PIL.Image.fromarray(contact_sheet(pairs)).save(sheet)
    return sheet


def draw(config: SampleConfig, model: ZoomLDM | None = None) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Yield (magnification, tile, reference) of each tile, uint8 (256, 256, 3); None where there is no reference.

    `model` saves loading the one that `config.model` names. Raises: EngineError; ValueError for a magnification that
    the model has not.
    """
    pin_arithmetic(config.model.threads)
    device = choose_device(config.model.device)
    keep_freed_memory(device)
    dtype = settle_dtype(config.model.dtype, lambda: None, this_process(device))
    config = replace(config, model=replace(config.model, dtype=dtype))  # type: ignore[arg-type]  # one of the key's
    model = load_model(config).to(device) if model is None else model
    name = config.magnification or model.config.scale.base
    index = model.config.scale.index(name)
    sampler = PatchSampler(config.scheduler, config.steps, config.scale, config.sampling.seed)
    conditions = summaries_drawn if config.condition == "cdm" else summaries_of_cells
    size = config.sampling.batch_size
    batches = zip(range(0, config.count, size), conditions(config, model, index), strict=True)
    for first, (context, references) in batches:
        images = to_uint8(sampler.draw_from(model, context, first)).transpose(0, 2, 3, 1)
        for image, reference in zip(images, references, strict=True):
            yield name, image, reference


Batch = tuple[Tensor, list[np.ndarray | None]]
"""Summaries (B, T, C), and per patch the picture it imitates, where there is one."""


def summaries_of_cells(config: SampleConfig, model: ZoomLDM, index: int) -> Iterator[Batch]:
    """Yield the summaries of cells of the source, spread over it, batch by batch. Raises EngineError."""
    factor = model.config.scale.factor(model.config.magnifications[index])
    source = read_source(config, model)
    if source.grid.shape[0] != model.config.ssl_dim:
        raise EngineError(
            f"SSL vectors must have {model.config.ssl_dim} channels ({model.config.encoder}); the source has "
            f"{source.grid.shape[0]}. Embed it with that encoder, or pass --reference."
        )
    corners = source.corners(factor, config.count)
    for first in range(0, config.count, config.sampling.batch_size):
        some = corners[first : first + config.sampling.batch_size]
        cells = [torch.from_numpy(source.grid[:, y : y + factor, x : x + factor]) for y, x in some]
        with torch.inference_mode():
            context = model.summarize(cells, [index] * len(cells))
        yield context, [source.reference(y, x, factor) for y, x in some]


def summaries_drawn(config: SampleConfig, model: ZoomLDM, index: int) -> Iterator[Batch]:
    """Yield summaries that the model's CDM draws, batch by batch. Raises CheckpointError when there is no CDM."""
    section, size = config.model, config.sampling.batch_size
    cdm = load_cdm(section.source, section.variant, section.cdm_source, model.device)
    for first in range(0, config.count, size):
        count = min(size, config.count - first)
        context = sample_summaries(cdm, index, count, config.cdm_steps, config.sampling.seed, first, count)
        yield context, [None] * count


def contact_sheet(pairs: list[tuple[np.ndarray | None, np.ndarray]], pairs_per_row: int = 4) -> np.ndarray:
    """Lay out (reference, drawn) pairs on white: uint8 (H, W, 3); a missing reference takes no room."""
    cells = [np.concatenate([p for p in pair if p is not None], axis=1) for pair in pairs]
    height, width = cells[0].shape[0] + _GAP_PX, cells[0].shape[1] + _GAP_PX
    columns = min(pairs_per_row, len(cells))
    rows = -(-len(cells) // columns)
    sheet = np.full((rows * height + _GAP_PX, columns * width + _GAP_PX, 3), 255, np.uint8)
    for i, cell in enumerate(cells):
        y, x = (i // columns) * height + _GAP_PX, (i % columns) * width + _GAP_PX
        sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return sheet
