"""Condition inversion: the SSL grid under a picture of low magnification, found through the denoiser itself.

No SSL encoder is asked: the picture shows no single cell at the base magnification. Invariant: the grid is a pure
function of (model, picture, settings, seed). It does not know runs or files.
Source: ZoomLDM (CVPR 2025), super-resolution by condition inversion.

Notation: a window is one tile (256×256 px) at the low magnification; n vectors on each of its axes are looked for, one
per base cell, or one per square of cells where the conditioner would average more than 8×8.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.core.errors import EngineError
from engine.core.numerics import noise_rows
from engine.core.units import TILE_LATENT_PX, TILE_PX
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import InversionConfig
from engine.sampling.plan import Level, Tiling, axis_positions
from engine.sampling.ssl_grid import MAX_CELLS

Tick = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def inversion_loss(
    model: ZoomLDM, grids: Tensor, latents: Tensor, noise: Tensor, t: int, magnification: int, variety: float
) -> Tensor:
    """Return sqrt(abar)·(1 − abar)·mean (eps_pred − noise)² − variety·mean cosine between cells, per window: (B,).

    `grids` are raw SSL vectors (B, D, n, n), `latents` and `noise` (B, 3, 64, 64). A model that predicts v is asked for
    its eps. The cosine is of raw vectors, each with itself too.
    """
    alpha_bar = float(model.alphas_cumprod[t - 1])
    x_t = alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * noise
    context = model.summarize(list(grids), [magnification] * len(grids))
    missed = (model.predict_eps(x_t, t, context, 0.0) - noise).square().mean(dim=(1, 2, 3))
    unit = F.normalize(grids.flatten(2), dim=1)
    cosine = torch.einsum("bdi,bdj->bij", unit, unit).mean(dim=(1, 2))
    return alpha_bar**0.5 * (1 - alpha_bar) * missed - variety * cosine


@dataclass(frozen=True)
class Windows:
    """How a picture is cut for inversion. Corners count in vectors."""

    n: int
    """Vectors on each axis of a window."""
    cells: int
    """Base cells that a vector stands for, on each axis."""
    tiling: Tiling
    level: Level

    @classmethod
    def over(cls, size_px: tuple[int, int], level: Level, config: InversionConfig) -> "Windows":
        """Cut a picture of (h, w) px at a level's magnification; the last window of an axis is shifted inward."""
        n = min(level.factor, MAX_CELLS)
        stride = max(round(n * (1 - config.overlap)), 1)
        ys, xs = (axis_positions(max(-(-side * n // TILE_PX), n), stride, n) for side in size_px)
        return cls(n, level.factor // n, Tiling(ys, xs, config.batch_size), level)

    @property
    def shape(self) -> tuple[int, int]:
        """Vectors under all windows: (h, w)."""
        return self.tiling.ys[-1] + self.n, self.tiling.xs[-1] + self.n

    @property
    def size_px(self) -> tuple[int, int]:
        """What the windows cover, (h, w) in px: the picture, or a little more."""
        h, w = self.shape
        return h * TILE_PX // self.n, w * TILE_PX // self.n

    def corners(self, tiles: tuple[int, ...]) -> list[tuple[int, int]]:
        return [self.tiling.corner(tile) for tile in tiles]


@torch.no_grad()
def encode_windows(model: ZoomLDM, picture: np.ndarray, windows: Windows) -> Tensor:
    """Encode each window of a picture, float32 (3, h, w) in [−1, 1] of `windows.size_px`: (N, 3, 64, 64)."""
    found, px = [], TILE_PX // windows.n
    for tiles in windows.tiling.batches():
        parts = [picture[:, y * px :, x * px :][:, :TILE_PX, :TILE_PX] for y, x in windows.corners(tiles)]
        found.append(model.encode(torch.from_numpy(np.stack(parts)).to(model.device)))
    return torch.cat(found)


def invert(
    model: ZoomLDM, latents: Tensor, windows: Windows, config: InversionConfig, seed: int, tick: Tick,
    start: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Find the SSL vectors under a picture, float32 (D, h, w) in base cells; `latents` are its windows' (N, 3, 64, 64).

    Windows share the vectors where they overlap: it is one grid for the whole picture, found by Adam on the sum of
    their losses, from noise or from `start` (D, *windows.shape). Raises: EngineError when a vector is not finite.
    """
    shape = (model.config.ssl_dim, *windows.shape)
    if start is None:
        start = np.random.default_rng(np.random.SeedSequence(seed)).standard_normal(shape, dtype=np.float32)
    with _differentiable(model):
        grid = torch.from_numpy(start.copy()).to(model.device).requires_grad_()
        adam = torch.optim.Adam([grid], lr=config.lr)
        for number, t in enumerate(config.timesteps):
            adam.zero_grad()
            for tiles in windows.tiling.batches():
                n, size = windows.n, (0, TILE_LATENT_PX)
                grids = torch.stack([grid[:, y : y + n, x : x + n] for y, x in windows.corners(tiles)])
                drawn = [noise_rows(seed, f"inversion/{tile}", number, size, TILE_LATENT_PX) for tile in tiles]
                noise = torch.from_numpy(np.stack(drawn)).to(latents)
                shown = latents[list(tiles)]
                inversion_loss(model, grids, shown, noise, t, windows.level.index, config.variety).sum().backward()
            adam.step()
            if not torch.isfinite(grid).all():
                raise EngineError(
                    f"condition inversion must find finite vectors; at t={t} they are not. Use model.dtype=float32, or "
                    f"a lower inversion.lr than {config.lr:g}."
                )
            tick(number + 1, config.steps)
    found = grid.detach().cpu().numpy()
    return np.ascontiguousarray(found.repeat(windows.cells, axis=1).repeat(windows.cells, axis=2))


@contextmanager
def _differentiable(model: ZoomLDM) -> Iterator[None]:
    """Let gradients pass through the model without collecting those of its weights."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter, needs in wanted:
            parameter.requires_grad_(needs)
