"""The SSL-like encoder of the embedded demo model: texture (texture_encoder.py), then PCA whitening.

Invariant: a cell's vector is a pure function of its pixels and of the stored mean and projection; every entry lies in
(−SQUASH, SQUASH), whatever the picture. It does not know slides or files.

Whitening makes all raw features count; its damping keeps directions that are mostly noise from counting as much.
A learned network would see more, but needs data and minutes per slide on the CPU the demo is for.
"""

from collections.abc import Mapping
from typing import Self

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from engine.core.errors import CheckpointError
from engine.model.encoders.base import digest_of, require_cells
from engine.model.encoders.texture import RAW_DIM, TextureEncoder

DIM = 64
SQUASH = 3.0
"""Whitened entries beyond about 3 deviations saturate: a real slide is far from a phantom in a few directions, and
one such direction must not swallow the cosine between two cells."""

_DAMPING = 0.1


class DemoEncoder(nn.Module):
    """A fitted filter-bank encoder; `id` is "demo". The filters are constants, only the whitening is stored."""

    id = "demo"
    center: Tensor
    projection: Tensor

    def __init__(self, center: Tensor, projection: Tensor) -> None:
        """Take `center` (RAW_DIM,) and `projection` (RAW_DIM, D), both float32; use fit or from_tensors."""
        super().__init__()
        self.register_buffer("center", center)
        self.register_buffer("projection", projection)
        self.texture = TextureEncoder().to(center.device)

    @property
    def dim(self) -> int:
        return self.projection.shape[1]

    @property
    def digest(self) -> str:
        return digest_of(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Return what `from_tensors` reads; kept in the model folder as "encoder/model"."""
        return {"center": self.center.detach().cpu(), "projection": self.projection.detach().cpu()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Build the encoder from stored tensors. Raises CheckpointError when they are not a demo encoder's."""
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        right = set(shapes) == {"center", "projection"} and shapes["center"] == (RAW_DIM,)
        right = right and len(shapes["projection"]) == 2 and shapes["projection"][0] == RAW_DIM
        if not right or not all(v.is_floating_point() and v.isfinite().all() for v in tensors.values()):
            raise CheckpointError(
                f"a demo encoder must hold finite center ({RAW_DIM},) and projection ({RAW_DIM}, D); got {shapes}. "
                "Restore the model folder's encoder/model.safetensors, or fit the encoder again."
            )
        return cls(tensors["center"].float(), tensors["projection"].float().contiguous())

    @classmethod
    def fit(cls, cells: Tensor, dim: int = DIM) -> Self:
        """Fit the whitening on uint8 cells `(N, 3, 256, 256)`; a few thousand cells of many slides are plenty.

        Raises: ValueError for fewer than 2·dim cells, too few to estimate the spectrum, or for cells without variety.
        """
        require_cells(cells)
        if not 1 <= dim <= RAW_DIM or len(cells) < 2 * dim:
            raise ValueError(
                f"fitting {dim} dimensions (1 to {RAW_DIM}) needs at least {2 * dim} cells; got {len(cells)}. "
                "Pass more cells or a smaller dim."
            )
        raw = TextureEncoder().encode(cells).double()
        spread, center = torch.std_mean(raw, dim=0)
        if not bool((spread > 1e-6).any()):
            raise ValueError(f"the {len(cells)} cells must differ to fit an encoder; all look the same.")
        # A feature that hardly moves on these cells must not be blown up on other ones.
        scale = 1 / spread.clamp_min(0.1 * float(spread.median()) + 1e-6)
        eigenvalues, axes = torch.linalg.eigh(torch.cov(((raw - center) * scale).T))
        eigenvalues, axes = eigenvalues.flip(0)[:dim].clamp_min(0), axes.flip(1)[:, :dim]
        # An eigenvector's sign is arbitrary; fixing it makes two fits of the same cells equal.
        axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
        damped = (eigenvalues + _DAMPING * eigenvalues.mean()).rsqrt()
        # Laid out as it is read back: another memory order may change the product's last bits.
        return cls(center.float(), (scale[:, None] * axes * damped).float().contiguous())

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Float32[Tensor, "b d"]:
        """Encode uint8 cells `(B, 3, 256, 256)` to float32 `(B, D)` in (−SQUASH, SQUASH), on the CPU.

        Raises: ValueError for another dtype or shape.
        """
        raw = self.texture.encode(images).to(self.center.device)
        # One cell at a time: the last bits of a product depend on how many rows it has.
        whitened = torch.cat([(cell - self.center) @ self.projection for cell in raw.split(1)])
        return (SQUASH * torch.tanh(whitened / SQUASH)).cpu()
