"""How a coarser level steers the next finer one.

`newton` works per tile, inside the replica (engine.sampling.denoiser). `linear` corrects the averaged x0 of
the whole canvas here, in the coordinator, without one more network call: the picture's coarse colours are pulled to the
guide's. Units: q = latent px per guided cell on each axis; colours in [−1, 1].
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from engine.core.numerics import box_reduce
from engine.core.units import LATENT_FACTOR
from engine.model.colour_map import LinearColour
from engine.sampling.config import GuidanceConfig


@dataclass(frozen=True)
class GuidePicture:
    """A coarser level's decoded x0 and how it lies over the finer level."""

    image: Float[np.ndarray, "3 h w"]
    """float32 (3, h, w) in [−1, 1], px of the coarser level."""
    ratio: int
    """Finer px per guide px."""
    offset: tuple[int, int] = (0, 0)
    """(y, x) latent px, less than a cell, from the image's corner to the first finer px, where that is a window."""

    @property
    def cell(self) -> int:
        """Latent px of the finer level per guided cell; below ratio 4 several guide px share one latent px."""
        return max(self.ratio // LATENT_FACTOR, 1)

    def cells(self, y0: int, y1: int, x1: int, size: int = 1) -> Float[Tensor, "1 3 h w"]:
        """Return the wished colours of rows y0..y1 and columns 0..x1 of `size` × `size` cells: float32 (1, 3, h, w).

        Past the image's border its last px is repeated.
        """
        share = max(LATENT_FACTOR // self.ratio, 1) * size
        window = torch.as_tensor(self.image[None, :, y0 * share : y1 * share, : x1 * share])
        missing = ((y1 - y0) * share - window.shape[2], x1 * share - window.shape[3])
        if any(missing):
            window = F.pad(window, (0, missing[1], 0, missing[0]), mode="replicate")
        return box_reduce(window, share)

    def square(self, y: int, x: int, size: int) -> Float[np.ndarray, "3 {size} {size}"]:
        """Return the guide px under one tile, (3, size, size); (y, x) in px of the finer level.

        Between guide px the four neighbours are mixed linearly; past the border the last px is repeated.
        """
        y, x = (at + LATENT_FACTOR * shift for at, shift in zip((y, x), self.offset, strict=True))
        (top, fy), (left, fx) = divmod(y / self.ratio, 1), divmod(x / self.ratio, 1)
        rows = np.minimum(np.arange(size + 1) + int(top), self.image.shape[1] - 1)
        columns = np.minimum(np.arange(size + 1) + int(left), self.image.shape[2] - 1)
        window = self.image[:, rows][:, :, columns]
        mixed = (1 - fy) * window[:, :-1] + fy * window[:, 1:]
        return ((1 - fx) * mixed[:, :, :-1] + fx * mixed[:, :, 1:]).astype(self.image.dtype)


class CanvasGuidance(Protocol):
    """Correct averaged x0 rows (1, 3, h, w) towards wished cell colours (1, 3, h/q, w/q)."""

    @property
    def cell(self) -> int:
        """Latent px of a cell on each axis at least: finer patterns of the guide are not wished for."""
        ...

    @property
    def halo_cells(self) -> int:
        """Cells above and below that a row's correction reads."""
        ...

    def correct(
        self, x0: Float[Tensor, "1 3 h w"], wished: Float[Tensor, "1 3 h//{q} w//{q}"], q: int
    ) -> Float[Tensor, "1 3 h w"]: ...


@dataclass(frozen=True)
class LinearGuidance:
    """Invert colour ≈ affine in the mean latent, with damping; spread the answer smoothly between cells."""

    colour: LinearColour
    strength: float
    damping: float
    cell: int = 1
    halo_cells: int = 1

    def correct(
        self, x0: Float[Tensor, "1 3 h w"], wished: Float[Tensor, "1 3 h//{q} w//{q}"], q: int
    ) -> Float[Tensor, "1 3 h w"]:
        missing = wished - self.colour.colour(box_reduce(x0, q))
        move = torch.einsum("ij,bjhw->bihw", self.colour.inverse(self.damping).to(x0), missing)
        return _moved(x0, self.strength, move, q)


def _moved(x0: Tensor, strength: float, move: Tensor, q: int) -> Tensor:
    """Return x0 + strength · move spread over its cells, with one array of x0's size beside it."""
    spread = _spread(move, q)
    return (strength * spread if spread is move else spread.mul_(strength)).add_(x0)


def _spread(move: Tensor, q: int) -> Tensor:
    """Enlarge one value per cell to latent px, linearly between cell centres, so that no cell border shows."""
    return F.interpolate(move, scale_factor=q, mode="bilinear", align_corners=False) if q > 1 else move


def make_canvas_guidance(config: GuidanceConfig, extras: dict[str, dict[str, Tensor]]) -> CanvasGuidance | None:
    """Return the coordinator's part of a method; None for newton and none.

    `extras` holds the fitted map under "guidance/linear". Raises: KeyError when it is missing.
    """
    if config.method == "linear":
        colour = LinearColour.from_tensors(extras["guidance/linear"])
        return LinearGuidance(colour, config.strength, config.damping, config.cell)
    return None


def steer_rows(
    guidance: CanvasGuidance, rows: Float32[np.ndarray, "3 n w"], span: tuple[int, int, int], guide: GuidePicture
) -> Float32[np.ndarray, "3 m w"]:
    """Correct latent rows [y0, y1) of x0 from `rows`, which start at `top` ≤ y0 and may reach past y1.

    `rows` is float32 (3, n, w); `span` is (top, y0, y1); top and y0 are multiples of the cell. Returns (3, y1−y0, w).
    """
    top, y0, y1 = span
    q, (above, left) = cell_of(guidance, guide), guide.offset
    height, width = rows.shape[1] + above, rows.shape[2] + left
    cells_h, cells_w = -(-height // q), -(-width // q)
    border = (left, cells_w * q - width, above, cells_h * q - height)
    x0 = torch.as_tensor(rows)[None]
    if any(border):
        x0 = F.pad(x0, border, mode="replicate")
    wished = guide.cells(top // q, top // q + cells_h, cells_w, q // guide.cell)
    corrected = guidance.correct(x0, wished, q)
    return corrected[0, :, y0 - top + above : y1 - top + above, left:width].numpy()


def halo_rows(guidance: CanvasGuidance, guide: GuidePicture) -> int:
    """Return the latent rows around a band that its correction reads; one cell more where bands cut cells."""
    return (guidance.halo_cells + any(guide.offset)) * cell_of(guidance, guide)


def cell_of(guidance: CanvasGuidance, guide: GuidePicture) -> int:
    """Return the latent px of a cell on each axis; both sizes are powers of two."""
    return max(guidance.cell, guide.cell)
