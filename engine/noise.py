"""Noise as a pure function of (seed, stream, step, block): any window, in any order, on any machine, is the same.

It does not know tiles, levels or schedules; a stream is a name. Drawn on the CPU by a counter-based generator
(Philox; Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3).
"""

import hashlib
from functools import lru_cache

import numpy as np

from engine.magnification import LATENT_CHANNELS

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
