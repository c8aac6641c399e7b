"""A denoiser without a network: every px depends on itself and its tile's cells alone, so that answers are known.

Overlapping tiles of one canvas agree wherever their cells do, whatever the tiling. For tests and for measuring
everything but the network; it lies beside LocalDenoiser so that nobody has to write another.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from engine.magnification import LATENT_FACTOR
from engine.predict import (
    DecodeBatch,
    DecodedBatch,
    EncodeBatch,
    EncodedBatch,
    TileBatch,
    TilePrediction,
    one_by_one,
)


class PointwiseDenoiser:
    """x0 = gain·x_t + mean of the tile's cells; decoding repeats each latent px 4×4, encoding takes the means back."""

    def __init__(self, gain: float = 0.5) -> None:
        self.gain = np.float32(gain)

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        for batch in one_by_one(batches):
            shift = batch.cells.mean(axis=(1, 2, 3), dtype=np.float32)[:, None, None, None]
            yield TilePrediction(batch.key, self.gain * batch.x_t + shift)

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        for batch in batches:
            yield DecodedBatch(batch.key, batch.latents.repeat(LATENT_FACTOR, 2).repeat(LATENT_FACTOR, 3))

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        f = LATENT_FACTOR
        for batch in batches:
            n, c, h, w = batch.images.shape
            cells = batch.images.reshape(n, c, h // f, f, w // f, f)
            yield EncodedBatch(batch.key, cells.mean(axis=(3, 5), dtype=np.float32))
