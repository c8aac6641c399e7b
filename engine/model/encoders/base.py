"""What every SSL encoder promises: uint8 cells in, one float32 vector per cell out.

Invariant: equal weights have equal digests, so an embedding can be traced to the network that made it. It does not
know a particular network or where weights come from (encoders.py).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from engine.core.units import TILE_PX


class SSLEncoder(Protocol):
    """A frozen network that describes one cell (256×256 px at the base magnification) by one vector."""

    @property
    def id(self) -> str:
        """The name the model config knows it by: "demo", "uni", "dinov2-reg-l", "phikon"."""
        ...

    @property
    def dim(self) -> int:
        """D, the length of one vector."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the weights (hex): names, dtypes, shapes and values."""
        ...

    def encode(self, images: Tensor) -> Float32[Tensor, "b d"]:
        """Encode uint8 RGB cells `(B, 3, 256, 256)` to float32 `(B, D)` on the CPU.

        Raises: ValueError for another dtype or shape.
        """
        ...


def require_cells(images: Tensor) -> None:
    """Raise ValueError unless `images` is uint8 `(B, 3, 256, 256)`: floats in [−1, 1] would encode to nonsense."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, TILE_PX, TILE_PX):
        raise ValueError(
            f"cells must be uint8 (B, 3, {TILE_PX}, {TILE_PX}); got {images.dtype} {tuple(images.shape)}. "
            "Pass RGB values 0 to 255, channels before rows."
        )


class NetworkEncoder(ABC):
    """An SSLEncoder around one frozen network; subclasses have an `id` and say how it sees pictures."""

    def __init__(self, network: nn.Module, dim: int) -> None:
        self.network, self.dim = network.eval().requires_grad_(False), dim

    @property
    def digest(self) -> str:
        """SHA-256 of the weights in the dtype they compute in; reads them all, 1.2 GB for a ViT-L."""
        return digest_of(self.network.state_dict())

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Float32[Tensor, "b d"]:
        """Encode uint8 cells `(B, 3, 256, 256)` to float32 `(B, D)` on the CPU, in one call of the network.

        Raises: ValueError for another dtype or shape.
        """
        require_cells(images)
        if not len(images):
            return torch.empty(0, self.dim)
        weight = next(self.network.parameters())
        return self._vectors(images.to(weight.device), weight.dtype).float().cpu()

    @abstractmethod
    def _vectors(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B, D) of at least one cell, which is where the network is."""


def digest_of(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 (hex) of named tensors, whatever their order or device; `dtype` rounds them first."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", dtype).contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
