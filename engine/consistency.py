"""A decoded picture moved onto those that reduce to its guide exactly: fine detail stays, colours are the guide's.

Invariant: where the picture already agrees nothing changes, and no row depends on how the stream was cut. It does not
know latents or files. Source: iterative back-projection (Irani & Peleg 1991), solved on the guide's grid.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.resize import box_reduce
from engine.strips import in_bands

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
    rows: Iterable[np.ndarray], height: int, guide: np.ndarray, factor: int, start: int = 0
) -> Iterator[np.ndarray]:
    """Yield the picture from row `start` on, float32 (3, n, w) in [−1, 1], so that its box average is the guide.

    `rows` begin at max(start − rows_above(factor), 0) and reach `height`; `start` is a multiple of BAND_PX. `guide` is
    float32 (3, h, w), each px a square of factor × factor px; what lies beyond the picture does not count.
    """
    for top, y0, y1, band in in_bands(rows, height, BAND_PX, rows_above(factor), start):
        wished = torch.from_numpy(guide[None, :, top // factor : -(-(top + band.shape[1]) // factor)])
        moved = moved_onto(torch.from_numpy(np.ascontiguousarray(band))[None], wished, factor)
        yield moved[0, :, y0 - top : y1 - top].numpy()


def moved_onto(picture: Tensor, wished: Tensor, factor: int) -> Tensor:
    """Return the picture (1, 3, h, w) in [−1, 1] with a smooth field added whose box average is what is missing.

    `wished` (1, 3, ceil(h/factor), ceil(w/factor)) is what its box average shall be.
    """
    height, width = picture.shape[-2:]
    cells_h, cells_w = -(-height // factor), -(-width // factor)
    whole = F.pad(picture, (0, cells_w * factor - width, 0, cells_h * factor - height), mode="replicate").clamp(-1, 1)
    missing = wished[..., :cells_h, :cells_w] - box_reduce(whole, factor)
    field = missing
    for _ in range(ITERATIONS):
        field = field + missing - _averaged(field)
    smooth = F.interpolate(field, scale_factor=factor, mode="bilinear", align_corners=False)
    return (whole + smooth).clamp(-1, 1)[..., :height, :width]


def _averaged(field: Tensor) -> Tensor:
    """Return the box average of the field enlarged bilinearly by any even factor: [1, 6, 1]/8 on each axis."""
    wide = F.pad(field, (1, 1, 1, 1), mode="replicate")
    tall = (wide[..., :-2, :] + 6 * wide[..., 1:-1, :] + wide[..., 2:, :]) / 8
    return (tall[..., :-2] + 6 * tall[..., 1:-1] + tall[..., 2:]) / 8
