"""Noise as a pure function of (seed, stream, step, block), and exact resizing by whole factors.

Any window of noise, in any order, on any machine, is the same: it is drawn on the CPU by a counter-based generator
(Philox; Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3). It does not know tiles, levels or schedules;
a stream is a name.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.core.units import LATENT_CHANNELS

BLOCK = 64
"""Noise is drawn in blocks of 64×64 latent px, so that a small window does not cost a large draw."""


@lru_cache(maxsize=4096)
def _stream_key(seed: int, stream: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _generator(seed: int, stream: str, *words: int) -> np.random.Generator:
    # The key names the stream; the upper counter words name the block, so blocks never share numbers.
    counter = np.array([0, *words], dtype=np.uint64)
    key = np.array([_stream_key(seed, stream), 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def noise_array(seed: int, stream: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal float32 of any shape, drawn at once: what is no part of a canvas."""
    return _generator(seed, stream, 0, 0, 0).standard_normal(shape, dtype=np.float32)


def noise_block(
    seed: int, stream: str, step: int, block_y: int, block_x: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Return standard normal float32 (3, 64, 64) for one block, in `out` if that is given."""
    generator = _generator(seed, stream, step, block_y, block_x)
    return generator.standard_normal((LATENT_CHANNELS, BLOCK, BLOCK), dtype=np.float32, out=out)


def noise_rows(seed: int, stream: str, step: int, rows: tuple[int, int], width: int) -> np.ndarray:
    """Return the noise of latent rows [y0, y1) of a canvas `width` latent px wide: float32 (3, y1-y0, width)."""
    y0, y1 = rows
    out = np.empty((LATENT_CHANNELS, y1 - y0, width), np.float32)
    block = np.empty((LATENT_CHANNELS, BLOCK, BLOCK), np.float32)
    for block_y in range(y0 // BLOCK, -(-y1 // BLOCK)):
        top, bottom = max(y0, block_y * BLOCK), min(y1, (block_y + 1) * BLOCK)
        for block_x in range(-(-width // BLOCK)):
            left, right = block_x * BLOCK, min(width, (block_x + 1) * BLOCK)
            noise_block(seed, stream, step, block_y, block_x, block)
            out[:, top - y0 : bottom - y0, left:right] = block[
                :, top - block_y * BLOCK : bottom - block_y * BLOCK, : right - left
            ]
    return out


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


Noise = Callable[[str, int, tuple[int, int], int], np.ndarray]
"""(stream, step, (y0, y1), width) → standard normal float32 (3, y1−y0, width)."""


def keyed_noise(seed: int) -> Noise:
    """Return the noise of a run: a pure function of its arguments."""
    return lambda stream, step, rows, width: noise_rows(seed, stream, step, rows, width)
