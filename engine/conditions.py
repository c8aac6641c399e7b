"""Which SSL grid a run is conditioned on: stored embeddings, a reference picture, or the demo's own grid.

The grid is kept in the run folder, so that a resume neither needs the encoder nor depends on where it ran. It does not
know canvases or networks other than the encoder.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.config import RunConfig
from engine.errors import CanvasError, EngineError
from engine.model.config import ModelConfig
from engine.model.encoders import load_encoder
from engine.model.hub import DEMO
from engine.reference import cover_canvas, embedding_grid, fit_grid, read_embeddings, read_reference
from engine.state import replacing
from engine.storage import open_storage
from engine.tiles import Plan

STORED = "conditions.npy"
DEMO_GRID = DEMO / "reference.safetensors"

Extras = dict[str, dict[str, Tensor]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Conditions:
    """The SSL vectors of the base cells, float32 (D, h, w), and the sha256 of where they come from."""

    grid: np.ndarray
    digest: str


def find_conditions(
    config: RunConfig, model: ModelConfig, extras: Extras, plan: Plan, device: str, say: Say
) -> Conditions:
    """Read or compute the grid under the canvas. `device` is where the SSL encoder runs; `extras` are the model's.

    Raises: EngineError when there is no condition, or it is unreadable or does not fit; CheckpointError when the
    encoder cannot be had.
    """
    try:
        if config.embeddings is not None:
            grid = read_embeddings(config.embeddings, plan.grid_shape)
            return _digested(fit_grid(grid, *plan.grid_shape, model.ssl_dim, config.embeddings))
        if config.reference is not None:
            return _from_picture(config, config.reference, model, extras, plan, device, say)
        if config.model.source == "demo":
            grid = load_file(DEMO_GRID)["grid"].numpy()
            return _digested(cover_canvas(grid, *plan.grid_shape, model.ssl_dim, str(DEMO_GRID)))
    except (ValueError, FileNotFoundError) as error:
        raise EngineError(str(error)) from error
    raise EngineError(
        "A run must be conditioned on something; neither a reference nor embeddings are given. Pass --reference "
        f"PICTURE (at {model.base_mpp:g} µm/px) or --embeddings FILE with {plan.grid_shape[0]} x {plan.grid_shape[1]} "
        f"vectors of {model.ssl_dim} ({model.encoder})."
    )


def keep_conditions(folder: Path, conditions: Conditions) -> None:
    """Store the grid in the run folder, once."""
    if not (folder / STORED).exists():
        with replacing(folder / STORED) as partial, partial.open("wb") as file:
            np.save(file, conditions.grid)


def _from_picture(
    config: RunConfig, reference: str, model: ModelConfig, extras: Extras, plan: Plan, device: str, say: Say
) -> Conditions:
    """Embed a picture, or take what an earlier start of the same run kept."""
    picture = read_reference(reference)
    digest = hashlib.sha256(picture.tobytes() + str(plan.grid_shape).encode()).hexdigest()
    kept = _kept_grid(config)
    if kept is not None:
        return Conditions(kept, digest)  # state.json's keys hold the digest, so another picture is refused
    dtype = getattr(torch, config.model.dtype)
    encoder = load_encoder(model.encoder, config.model.encoder_source, extras, device, dtype)
    grid = embedding_grid(picture, encoder)
    h, w = plan.grid_shape
    if grid.shape[1:] != (h, w):
        say(
            f"{reference} covers {grid.shape[1]} x {grid.shape[2]} cells, the canvas {h} x {w}: what is too much is "
            "left out, what is missing is mirrored."
        )
    return Conditions(cover_canvas(grid, h, w, model.ssl_dim, reference), digest)


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
            f"{name} must hold this run's SSL grid; {error}. Remove it to embed the picture again."
        ) from error


def _digested(grid: np.ndarray) -> Conditions:
    return Conditions(grid, hashlib.sha256(grid.tobytes() + str(grid.shape).encode()).hexdigest())
