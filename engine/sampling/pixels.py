"""Between latents and pixels: a picture decoded in overlapping windows, a guide enlarged and encoded.

Everything is streamed row by row, so a picture of any size fits into bounded memory, and no row depends on how the
stream was cut. It does not know levels, passes or files. Sources: ZoomLDM's large decoder (Gaussian-weighted windows);
iterative back-projection (Irani & Peleg 1991), solved on the guide's grid.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from engine.canvas.canvas import BAND
from engine.core.numerics import box_reduce, resize_by
from engine.core.streaming import BandReader, Box, ReadRows, cut, in_bands
from engine.core.units import LATENT_CHANNELS, LATENT_FACTOR, TILE_LATENT_PX, TILE_PX
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


def enlarged_tile(guide: GuidePicture, y: int, x: int) -> Float32[np.ndarray, "3 256 256"]:
    """Return the guide enlarged over one tile at latent px (y, x), float32 (3, 256, 256) in [−1, 1].

    Its surroundings count as far as the correction reaches; past the guide's border its last px is repeated.
    """
    ratio, margin = guide.ratio, rows_above(1)
    spans: list[NDArray[np.intp]] = []
    offsets: list[int] = []
    for start, side in zip((y * LATENT_FACTOR, x * LATENT_FACTOR), guide.image.shape[1:], strict=True):
        first, last = start // ratio - margin, -(-(start + TILE_PX) // ratio) + margin
        spans.append(np.clip(np.arange(first, last), 0, side - 1))
        offsets.append(start - first * ratio)
    small = torch.as_tensor(guide.image[:, spans[0]][:, :, spans[1]])[None]
    large = moved_onto(resize_by(small, ratio), small, ratio)[0]
    return large[:, offsets[0] : offsets[0] + TILE_PX, offsets[1] : offsets[1] + TILE_PX].numpy()


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
