"""What every SSL encoder promises: uint8 cells in, one float32 vector per cell out.

Invariant: equal weights have equal digests, so an embedding can be traced to the network that made it. It does not
know a particular network or where weights come from (encoders.py).
"""

import hashlib
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.magnification import TILE_PX


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

    def encode(self, images: Tensor) -> Tensor:
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


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of named tensors, whatever their order or device."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
