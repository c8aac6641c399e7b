"""Cheap maps from latents to coarse colour: what guidance asks instead of the autoencoder.

Both are fitted once per checkpoint, on latents and the pictures its decoder makes of them. Colours are in [−1, 1];
a cell is a square of q×q latent px. They know neither canvases nor timesteps.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.magnification import LATENT_CHANNELS, LATENT_FACTOR
from engine.resize import box_reduce

_FIT_CELLS = (1, 2, 4)
"""Cell sizes in latent px that a fit sees, so that one map serves every guide."""


@dataclass(frozen=True)
class LinearColour:
    """colour ≈ matrix · mean latent + offset."""

    matrix: Tensor
    """float64 (3, 3)."""
    offset: Tensor
    """float64 (3,)."""

    @classmethod
    def fit(cls, latents: Tensor, images: Tensor) -> Self:
        """Fit by least squares on 16 px cells of (N, 3, 64, 64) latents and their (N, 3, 256, 256) pictures."""
        x = _cells(latents, 4)
        y = _cells(images, 4 * LATENT_FACTOR)
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        # Normal equations: four unknowns, well scaled; the same bytes whatever LAPACK's threads.
        solution = torch.linalg.solve(design.T @ design + 1e-9 * torch.eye(4, dtype=x.dtype), design.T @ y)
        return cls(solution[:-1].T.contiguous(), solution[-1].contiguous())

    def colour(self, cells: Tensor) -> Tensor:
        """Return the colour (B, 3, h, w) of mean latents (B, 3, h, w)."""
        return torch.einsum("ij,bjhw->bihw", self.matrix.to(cells), cells) + self.offset.to(cells)[:, None, None]

    def inverse(self, damping: float) -> Tensor:
        """Return the damped pseudo-inverse (3, 3); `damping` is in units of the mean eigenvalue of M·Mᵀ."""
        gram = self.matrix @ self.matrix.T
        ridge = damping * torch.trace(gram) / 3 * torch.eye(3, dtype=gram.dtype)
        return self.matrix.T @ torch.linalg.inv(gram + ridge)

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix, "offset": self.offset}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(tensors["matrix"].double(), tensors["offset"].double())


class ThumbnailProbe(nn.Module):
    """A thumbnail decoder of about 16 thousand parameters: latents (B, 3, h, w) → colour of q×q cells."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.fine = nn.Conv2d(LATENT_CHANNELS, width, 3, padding=1, padding_mode="replicate")
        self.coarse = nn.Conv2d(width, width + 16, 3, padding=1, padding_mode="replicate")
        self.out = nn.Conv2d(width + 16, 3, 1)

    def forward(self, latents: Tensor, q: int) -> Tensor:
        pooled = box_reduce(F.silu(self.fine(latents)), q)
        return self.out(F.silu(self.coarse(pooled)))

    def tensors(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        probe = cls(width=tensors["fine.weight"].shape[0])
        probe.load_state_dict({k: v.float() for k, v in tensors.items()})
        return probe.eval().requires_grad_(requires_grad=False)

    @classmethod
    def fit(cls, latents: Tensor, images: Tensor, iterations: int = 400, seed: int = 0) -> Self:
        """Distil from (N, 3, 64, 64) latents and their pictures, clean and perturbed, on all cell sizes."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            probe = cls()
        optimiser = torch.optim.Adam(probe.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
        latents, images = latents.float(), images.float()
        for i in range(iterations):
            pick = torch.randint(len(latents), (8,), generator=generator)
            q = _FIT_CELLS[i % len(_FIT_CELLS)]
            x = latents[pick]
            # A constant shift per channel moves colours off the data; the affine part must not forget which way.
            noise = 0.05 * torch.randn(x.shape, generator=generator)
            loss = F.mse_loss(probe(x + noise, q), box_reduce(images[pick], q * LATENT_FACTOR))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return probe.eval().requires_grad_(requires_grad=False)


def _cells(pictures: Tensor, size: int) -> Tensor:
    """Return the mean colours of all size×size cells, float64 (N, 3)."""
    return box_reduce(pictures.double(), size).permute(0, 2, 3, 1).reshape(-1, 3)
