"""Bicubic resizing with anti-aliasing and mirrored borders, as the published Newton correction uses it.

Invariant: a constant stays that constant, up to its edges. It does not know what the pictures show.
Source: torch's antialiased bicubic (a = -0.5) equals the published kernel once the input is mirror-padded.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def mirror_indices(size: int, pad: int, device: torch.device) -> Tensor:
    """Return source indices of an axis mirrored at its borders, the edge pixel repeated: (size + 2·pad,)."""
    i = torch.arange(-pad, size + pad, device=device) % (2 * size)
    return torch.where(i < size, i, 2 * size - 1 - i)


def resize_by(x: Tensor, scale: float) -> Tensor:
    """Resize (B, C, h, w) by `scale` on both axes; h·scale and w·scale must be whole.

    Raises: ValueError when the result would not have whole px.
    """
    h, w = x.shape[-2:]
    out_h, out_w = round(h * scale), round(w * scale)
    if abs(out_h - h * scale) > 1e-6 or abs(out_w - w * scale) > 1e-6 or min(out_h, out_w) < 1:
        raise ValueError(f"size times scale must be whole px; got {h}x{w} times {scale}.")
    if scale == 1:
        return x
    pad = round(2 / scale) if scale < 1 else 4
    crop = round(pad * scale)
    rows, columns = mirror_indices(h, pad, x.device), mirror_indices(w, pad, x.device)
    padded = x[..., rows, :][..., columns]
    size = (out_h + 2 * crop, out_w + 2 * crop)
    resized = F.interpolate(padded, size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized[..., crop : crop + out_h, crop : crop + out_w]


def box_reduce(x: Tensor, factor: int) -> Tensor:
    """Average (B, C, h, w) over factor × factor squares; h and w must be multiples of it."""
    return F.avg_pool2d(x, factor) if factor > 1 else x
