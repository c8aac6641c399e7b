"""Cheap maps from latents to coarse colour: what guidance asks instead of the autoencoder.

Both are fitted once per checkpoint, on latents and the pictures its decoder makes of them. Colours are in [−1, 1];
a cell is a square of q×q latent px. They know neither canvases nor timesteps.
"""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from engine.core.numerics import box_reduce
from engine.core.units import LATENT_FACTOR


@dataclass(frozen=True)
class LinearColour:
    """colour ≈ matrix · mean latent + offset."""

    matrix: Float64[Tensor, "3 3"]
    """float64 (3, 3)."""
    offset: Float64[Tensor, "3"]
    """float64 (3,)."""

    @classmethod
    def fit(cls, latents: Float[Tensor, "n 3 h w"], images: Float[Tensor, "n 3 4*h 4*w"]) -> Self:
        """Fit by least squares on 16 px cells of (N, 3, 64, 64) latents and their (N, 3, 256, 256) pictures."""
        x = _cells(latents, 4)
        y = _cells(images, 4 * LATENT_FACTOR)
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        # Normal equations: four unknowns, well scaled; the same bytes whatever LAPACK's threads.
        solution = torch.linalg.solve(design.T @ design + 1e-9 * torch.eye(4, dtype=x.dtype), design.T @ y)
        return cls(solution[:-1].T.contiguous(), solution[-1].contiguous())

    def colour(self, cells: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the colour (B, 3, h, w) of mean latents (B, 3, h, w)."""
        return torch.einsum("ij,bjhw->bihw", self.matrix.to(cells), cells) + self.offset.to(cells)[:, None, None]

    def inverse(self, damping: float) -> Float64[Tensor, "3 3"]:
        """Return the damped pseudo-inverse (3, 3); `damping` is in units of the mean eigenvalue of M·Mᵀ."""
        gram = self.matrix @ self.matrix.T
        ridge = damping * torch.trace(gram) / 3 * torch.eye(3, dtype=gram.dtype)
        return self.matrix.T @ torch.linalg.inv(gram + ridge)

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix, "offset": self.offset}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(tensors["matrix"].double(), tensors["offset"].double())


def _cells(pictures: Tensor, size: int) -> Tensor:
    """Return the mean colours of all size×size cells, float64 (N, 3)."""
    return box_reduce(pictures.double(), size).permute(0, 2, 3, 1).reshape(-1, 3)
