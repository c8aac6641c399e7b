"""Between latents and pixels: a picture decoded in overlapping windows, a guide enlarged and encoded.

Everything is streamed row by row, so a picture of any size fits into bounded memory, and no row depends on how the
stream was cut. It does not know levels, passes or files. Source: ZoomLDM's large decoder (Gaussian-weighted windows).
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float, Float32, UInt8

from engine.canvas.canvas import BAND
from engine.core.streaming import BandReader, Box, ReadRows, cut
from engine.core.units import LATENT_CHANNELS, LATENT_FACTOR, TILE_LATENT_PX, TILE_PX
from engine.sampling.back_projection import GuideWindows
from engine.sampling.blend import RowAverager, gaussian_weight, smooth_weight
from engine.sampling.denoiser import DecodeBatch, DecodedBatch, DenoiseTiles, EncodeBatch
from engine.sampling.guidance import GuidePicture
from engine.sampling.plan import Tiling, gather_tiles, touching


def decode_rows(
    read: ReadRows,
    size: tuple[int, int],
    tiling: Tiling,
    denoiser: DenoiseTiles,
    sigma: float,
    key: str,
    start: int = 0,
) -> Iterator[np.ndarray]:
    """Return the picture from latent row `start` on, top to bottom: rows float32 (3, n, 4·width), not clamped.

    `size` is (height, width) in latent px. Batches are the same whatever `start` is; those above it are skipped. The
    denoiser has its batches from the call on, so that a picture can be decoded beside other work.
    """
    first_row = next(r for r, y in enumerate(tiling.ys) if y + TILE_LATENT_PX > start)
    first_tile = first_row * len(tiling.xs)
    batches = [b for b in tiling.batches() if b[-1] >= first_tile]
    windows = (DecodeBatch(f"{key}/{b[0] // tiling.batch_size}", b, gather_tiles(read, tiling, b)) for b in batches)
    averager = RowAverager(3, size[1] * LATENT_FACTOR, gaussian_weight(TILE_PX, sigma))
    averager.y0 = tiling.ys[first_row] * LATENT_FACTOR
    surplus = (start - tiling.ys[first_row]) * LATENT_FACTOR
    answers = zip(batches, denoiser.decode(windows), strict=True)
    return _averaged(answers, averager, tiling, size[0], first_tile, surplus)


def _averaged(
    answers: Iterable[tuple[tuple[int, ...], DecodedBatch]],
    averager: RowAverager,
    tiling: Tiling,
    height: int,
    first_tile: int,
    surplus: int,
) -> Iterator[np.ndarray]:
    """Yield finished rows from `first_tile` on, without the `surplus` px rows above those asked for."""
    for tiles, answer in answers:
        for tile, image in zip(tiles, answer.images, strict=False):
            if tile < first_tile:
                continue
            y, x = tiling.corner(tile)
            averager.add(y * LATENT_FACTOR, x * LATENT_FACTOR, image)
            rows = averager.pop(tiling.finished_rows(tile, height) * LATENT_FACTOR)
            drop = min(surplus, rows.shape[1])
            surplus -= drop
            if rows.shape[1] > drop:
                yield rows[:, drop:]


def decode_part(
    read: Callable[[Box], np.ndarray],
    windows: Tiling,
    part: Box,
    denoiser: DenoiseTiles,
    sigma: float,
    key: str,
    start: int = 0,
) -> Iterator[np.ndarray]:
    """Yield a part (px) of a level's picture from its row `start` on, top to bottom: float32 (3, n, w), not clamped.

    `read` gives a box of the level's latents, float32 (3, h, w); `windows` are those of the whole level, of which the
    ones that touch the part are decoded. Batches are the same whatever `start` is.
    """
    tiling, filled = touching(windows, part.latent())
    height, width = filled.size
    top = (part.y0 + start) // LATENT_FACTOR - filled.y0

    def rows(y0: int, y1: int) -> np.ndarray:
        return read(Box(filled.y0 + y0, filled.x0, filled.y0 + y1, filled.x1))

    found = decode_rows(BandReader(rows, height, BAND), (height, width), tiling, denoiser, sigma, key, top)
    left = part.x0 - filled.x0 * LATENT_FACTOR
    first = part.y0 + start - (filled.y0 + top) * LATENT_FACTOR
    return cut(found, (first, first + part.size[0] - start), (left, left + part.size[1]))


def clamped(rows: Iterable[np.ndarray], height: int, width: int) -> Float32[np.ndarray, "3 {height} {width}"]:
    """Gather rows (3, n, w) to one picture, clamped to [−1, 1]: float32 (3, h, w), held once and not three times."""
    picture, y0 = np.empty((3, height, width), np.float32), 0
    for part in rows:
        np.clip(part, -1, 1, out=picture[:, y0 : y0 + part.shape[1]])
        y0 += part.shape[1]
    assert y0 == height  # the windows cover a level
    return picture


def to_uint8(rows: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Map [−1, 1] to 0..255, truncating as the published recipe does."""
    work = rows + 1  # one copy to work in: rows of a large picture are hundreds of MB
    work /= 2
    np.clip(work, 0, 1, out=work)
    work *= 255
    return work.astype(np.uint8)


def enlarged_latents(
    guide: GuidePicture, tiling: Tiling, size: tuple[int, int], denoiser: DenoiseTiles, key: str
) -> Iterator[np.ndarray]:
    """Yield the latents of the enlarged guide over a level, top to bottom, float32 (3, n, w).

    `size` is the level's (height, width) in latent px, `tiling` cuts it into what is encoded together.
    """

    def batches() -> Iterator[EncodeBatch]:
        for number, tiles in enumerate(tiling.batches()):
            corners = [tiling.corner(tile) for tile in tiles]
            padding = corners[-1:] * (tiling.batch_size - len(corners))
            yield EncodeBatch(f"{key}/{number}", tiles, GuideWindows.of(guide, corners + padding))

    height, width = size
    averager = RowAverager(LATENT_CHANNELS, width, smooth_weight(TILE_LATENT_PX))
    for tiles, answer in zip(tiling.batches(), denoiser.encode(batches()), strict=True):
        for tile, value in zip(tiles, answer.latents, strict=False):
            averager.add(*tiling.corner(tile), value)
            rows = averager.pop(tiling.finished_rows(tile, height))
            if rows.shape[1]:
                yield rows
