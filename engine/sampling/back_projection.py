"""A picture moved onto its guide, so that its box average is the guide; a guide enlarged over tiles that way.

It does not know levels, passes or files. Source: iterative back-projection (Irani & Peleg 1991), solved on the guide's
grid.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from engine.core.numerics import box_reduce, resize_by
from engine.core.streaming import in_bands
from engine.core.units import LATENT_FACTOR, TILE_PX
from engine.sampling.guidance import GuidePicture

BAND_PX = 256
"""Rows corrected at once; a multiple of every factor between a picture and its guide."""
ITERATIONS = 12
"""What is missing of the finest pattern that the guide can show falls to 0.75 of itself in each."""
_HALO = ITERATIONS + 2
"""Guide px beyond a band on which its rows depend."""


def rows_above(factor: int) -> int:
    """Return how many rows above a band `consistent_rows` has to see, in px of the picture."""
    return _HALO * factor


def consistent_rows(
    rows: Iterable[np.ndarray],
    height: int,
    guide: Float32[np.ndarray, "3 h w"],
    factor: int,
    start: int = 0,
    most: int = 255,
) -> Iterator[np.ndarray]:
    """Yield the picture from row `start` on, float32 (3, n, w) in [−1, 1], so that its box average is the guide.

    No guide px takes a correction of more than `most` grey levels.

    `rows` begin at max(start − rows_above(factor), 0) and reach `height`; `start` is a multiple of BAND_PX. `guide` is
    float32 (3, h, w), each px a square of factor × factor px; what lies beyond the picture does not count.
    """
    for top, y0, y1, band in in_bands(rows, height, BAND_PX, rows_above(factor), start):
        wished = torch.as_tensor(guide[None, :, top // factor : -(-(top + band.shape[1]) // factor)])
        moved = moved_onto(torch.as_tensor(np.ascontiguousarray(band))[None], wished, factor, most)
        yield moved[0, :, y0 - top : y1 - top].numpy()


def moved_onto(
    picture: Float[Tensor, "1 3 h w"], wished: Float[Tensor, "1 3 cells_h cells_w"], factor: int, most: int = 255
) -> Float[Tensor, "1 3 h w"]:
    """Return the picture (1, 3, h, w) in [−1, 1] with a smooth field added whose box average is what is missing.

    `wished` (1, 3, ceil(h/factor), ceil(w/factor)) is what its box average shall be, at most `most` grey levels away.
    """
    height, width = picture.shape[-2:]
    cells_h, cells_w = -(-height // factor), -(-width // factor)
    whole = F.pad(picture, (0, cells_w * factor - width, 0, cells_h * factor - height), mode="replicate").clamp(-1, 1)
    missing = wished[..., :cells_h, :cells_w] - box_reduce(whole, factor)
    if most < 255:
        missing = missing.clamp(-most / 127.5, most / 127.5)
    field = missing
    for _ in range(ITERATIONS):
        field = field + missing - _box_averaged(field)
    smooth = F.interpolate(field, scale_factor=factor, mode="bilinear", align_corners=False)
    return (whole + smooth).clamp(-1, 1)[..., :height, :width]


def _box_averaged(field: Tensor) -> Tensor:
    """Return the box average of the field enlarged bilinearly by any even factor: [1, 6, 1]/8 on each axis."""
    wide = F.pad(field, (1, 1, 1, 1), mode="replicate")
    tall = (wide[..., :-2, :] + 6 * wide[..., 1:-1, :] + wide[..., 2:, :]) / 8
    return (tall[..., :-2] + 6 * tall[..., 1:-1] + tall[..., 2:]) / 8


@dataclass(frozen=True)
class GuideWindows:
    """What a guide shows over tiles, in its own px: at ratio 4 a seventh of the tiles', so that little travels."""

    px: Float32[np.ndarray, "b 3 n n"]
    """float32 (B, 3, n, n) in [−1, 1]: the tiles and their surroundings as far as the correction reaches."""
    ratio: int
    """Px of a tile per guide px."""
    offsets: tuple[tuple[int, int], ...]
    """Of each tile (y, x), px of the enlarged window above it and left of it."""

    @classmethod
    def of(cls, guide: GuidePicture, corners: Sequence[tuple[int, int]]) -> "GuideWindows":
        """Cut the windows of the tiles at these (y, x) latent px; past the guide's border its last px is repeated."""
        ratio, margin = guide.ratio, rows_above(1)
        side = -(-(TILE_PX + ratio - 1) // ratio) + 2 * margin  # a tile begins anywhere in a guide px
        firsts = [tuple(at * LATENT_FACTOR // ratio - margin for at in corner) for corner in corners]
        px = np.empty((len(corners), len(guide.image), side, side), np.float32)
        for window, first in zip(px, firsts, strict=True):
            spans = (np.arange(start, start + side) for start in first)
            y, x = (np.clip(s, 0, whole - 1) for s, whole in zip(spans, guide.image.shape[1:], strict=True))
            window[:] = guide.image[:, y][:, :, x]
        starts = zip(corners, firsts, strict=True)
        offsets = tuple((y * LATENT_FACTOR - top * ratio, x * LATENT_FACTOR - left * ratio)
                        for (y, x), (top, left) in starts)  # fmt: skip
        return cls(px, ratio, offsets)

    def enlarged(self, device: torch.device | str = "cpu") -> Float[Tensor, "b 3 256 256"]:
        """Return the guide enlarged over each tile, float32 (B, 3, 256, 256) in [−1, 1], computed on `device`."""
        found = torch.empty(len(self.offsets), 3, TILE_PX, TILE_PX, device=device)
        for tile, (y, x) in enumerate(self.offsets):  # one by one: at large ratios a window is many times its tile
            small = torch.as_tensor(self.px[tile : tile + 1]).to(device)
            large = moved_onto(resize_by(small, self.ratio), small, self.ratio)
            found[tile] = large[0, :, y : y + TILE_PX, x : x + TILE_PX]
        return found
