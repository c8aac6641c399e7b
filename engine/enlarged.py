"""A given guide enlarged to the canvas and encoded: what super-resolution begins from, noised.

Enlarged bicubically and moved onto the pictures that reduce to the guide, tile by tile, top to bottom, so that no
canvas is too large. It does not know runs or files. Source: Meng et al. 2022 (SDEdit) for beginning from a picture.
"""

from collections.abc import Iterator

import numpy as np
import torch

from engine.blend import RowAverager, smooth_weight
from engine.consistency import moved_onto, rows_above
from engine.guidance import GuidePicture
from engine.magnification import LATENT_CHANNELS, LATENT_FACTOR, TILE_LATENT_PX, TILE_PX
from engine.predict import DenoiseTiles, EncodeBatch
from engine.resize import resize_by
from engine.tiles import Tiling


def enlarged_latents(
    guide: GuidePicture, tiling: Tiling, size: tuple[int, int], denoiser: DenoiseTiles, key: str
) -> Iterator[np.ndarray]:
    """Yield the latents of the enlarged guide over a level, top to bottom, float32 (3, n, w).

    `size` is the level's (height, width) in latent px, `tiling` cuts it into what is encoded together.
    """

    def batches() -> Iterator[EncodeBatch]:
        for number, tiles in enumerate(tiling.batches()):
            images = [enlarged_tile(guide, *tiling.corner(tile)) for tile in tiles]
            padding = images[-1:] * (tiling.batch_size - len(images))
            yield EncodeBatch(f"{key}/{number}", tiles, np.stack(images + padding))

    height, width = size
    averager = RowAverager(LATENT_CHANNELS, width, smooth_weight(TILE_LATENT_PX))
    for tiles, answer in zip(tiling.batches(), denoiser.encode(batches()), strict=True):
        for tile, value in zip(tiles, answer.latents, strict=False):
            averager.add(*tiling.corner(tile), value)
            rows = averager.pop(tiling.finished_rows(tile, height))
            if rows.shape[1]:
                yield rows


def enlarged_tile(guide: GuidePicture, y: int, x: int) -> np.ndarray:
    """Return the guide enlarged over one tile at latent px (y, x), float32 (3, 256, 256) in [−1, 1].

    Its surroundings count as far as the correction reaches; past the guide's border its last px is repeated.
    """
    ratio, margin = guide.ratio, rows_above(1)
    spans, offsets = [], []
    for start, side in zip((y * LATENT_FACTOR, x * LATENT_FACTOR), guide.image.shape[1:], strict=True):
        first, last = start // ratio - margin, -(-(start + TILE_PX) // ratio) + margin
        spans.append(np.clip(np.arange(first, last), 0, side - 1))
        offsets.append(start - first * ratio)
    small = torch.from_numpy(guide.image[:, spans[0]][:, :, spans[1]])[None]
    large = moved_onto(resize_by(small, ratio), small, ratio)[0]
    return large[:, offsets[0] : offsets[0] + TILE_PX, offsets[1] : offsets[1] + TILE_PX].numpy()
