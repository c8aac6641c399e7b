"""Fit a checkpoint's colour map when it carries none: draw a few tiles without guidance, decode them, fit on the pairs.

Published checkpoints know nothing of our guidance. The map is a pure function of (model, grid, weight); a run keeps it
in its folder, so that a resume uses the same one. It does not know canvases or Ray.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from engine.core.errors import CanvasError
from engine.core.files import write_atomically
from engine.core.numerics import noise_rows
from engine.core.units import TILE_LATENT_PX
from engine.model.colour_map import LinearColour
from engine.sampling.denoiser import DecodeBatch, DenoiseTiles, TileBatch
from engine.sampling.schedule import steps
from engine.sampling.ssl_grid import tile_cells

FIT_TILES = 16
FIT_STRIDE = 100
"""Timesteps between two steps of such a tile: colours settle long before detail does."""

Maps = dict[str, dict[str, Tensor]]
"""Tensors by "guidance/linear", as a model's extras hold them."""


def stored_or_fitted(path: Path, grid: np.ndarray, denoiser: DenoiseTiles, weight: float, batch_size: int) -> Maps:
    """Return the map of linear guidance from `path`, fitting and storing it first when it is not there.

    `grid` is float32 (D, h, w). Raises: CanvasError when the stored map is damaged.
    """
    if not path.exists():
        tensors = fit_map(grid, denoiser, weight, batch_size)
        write_atomically(path, save({k: v.contiguous() for k, v in tensors.items()}))
    try:
        return {"guidance/linear": load_file(path)}
    except (SafetensorError, OSError) as error:
        raise CanvasError(
            f"{path} must hold the guidance map of this run; {error}. Remove it to fit it again."
        ) from error


def fit_map(grid: np.ndarray, denoiser: DenoiseTiles, weight: float, batch_size: int) -> dict[str, Tensor]:
    """Draw tiles at the base magnification over the grid and fit the colour map to them."""
    count = -(-FIT_TILES // batch_size) * batch_size
    latents = np.concatenate(
        [_draw(grid, denoiser, weight, range(i, i + batch_size), count) for i in range(0, count, batch_size)]
    )
    batches = [
        DecodeBatch(f"pilot/decode/{i // batch_size}", tuple(range(batch_size)), latents[i : i + batch_size])
        for i in range(0, count, batch_size)
    ]
    images = np.concatenate([answer.images for answer in denoiser.decode(batches)])
    pair = torch.from_numpy(latents), torch.from_numpy(np.clip(images, -1, 1))
    return LinearColour.fit(*pair).tensors()


def _draw(grid: np.ndarray, denoiser: DenoiseTiles, weight: float, numbers: range, count: int) -> np.ndarray:
    """Return the latents of some of the `count` tiles, spread evenly over the grid's cells: (B, 3, 64, 64)."""
    total = grid.shape[1] * grid.shape[2]
    places = [divmod(number * total // count, grid.shape[2]) for number in numbers]
    cells = np.stack([tile_cells(grid, y * TILE_LATENT_PX, x * TILE_LATENT_PX, 1) for y, x in places])

    def noise(step: int) -> np.ndarray:
        size = (0, TILE_LATENT_PX)
        return np.stack([noise_rows(0, f"pilot/{number}", step, size, TILE_LATENT_PX) for number in numbers])

    x_t = noise(0)
    for i, step in enumerate(steps(1000, FIT_STRIDE)):
        batch = TileBatch(
            key=f"pilot/t={step.t}/{numbers.start}",
            tiles=tuple(numbers),
            x_t=x_t,
            timestep=step.t,
            alpha_bar=step.alpha_bar,
            cells=cells,
            magnification=0,
            weight=weight,
        )
        x0 = next(iter(denoiser.denoise([batch]))).x0
        x_t = step.update(x0, step.eps_from_x0(x_t, x0), noise(i + 1))
    return x_t
