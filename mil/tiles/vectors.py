"""Pictures → one vector each, in blocks on disk: a stopped run repeats at most one block.

A picture is brought to the encoder's µm/px; one that is then smaller than a tile is enlarged to it. It is cut into as
few tiles as cover it, evenly spread; its vector is their mean. Nothing is padded, for no encoder knows padding.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from engine.core.files import replacing
from engine.core.units import TILE_PX
from engine.features.tile_encoders import TileEncoder, TilePixels
from mil.errors import CohortError
from mil.tiles.pictures import Picture

BLOCK = 64
"""Pictures encoded and stored together."""
Image.MAX_IMAGE_PIXELS = None  # regions of slides are large, and come from the user's own disk


def tiles_of(path: Path, mpp: float, base_mpp: float) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return corners (n, 2) x, y and pixels uint8 (n, 3, 256, 256) of a picture's tiles. Raises CohortError."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise CohortError(f"{path} must be a picture; it cannot be read: {error}. Remove it, or mend it.") from error
    ratio = mpp / base_mpp
    ratio = max(ratio, TILE_PX / min(picture.size))
    size = max(TILE_PX, round(picture.width * ratio)), max(TILE_PX, round(picture.height * ratio))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS if ratio > 1 else Image.Resampling.BOX)
    xs, ys = (_starts(side) for side in size)
    pixels = np.asarray(picture)
    coords = np.array([(x, y) for y in ys for x in xs], np.int64)
    cut = [pixels[y : y + TILE_PX, x : x + TILE_PX].transpose(2, 0, 1) for x, y in coords]
    return coords, np.ascontiguousarray(np.stack(cut))


def _starts(side: int) -> list[int]:
    count = math.ceil(side / TILE_PX)
    return [round(i * (side - TILE_PX) / max(1, count - 1)) for i in range(count)]


def encode_pictures(
    pictures: Sequence[Picture], mpp: float, encoder: TileEncoder, scale: tuple[str, float], folder: Path,
    say: Callable[[str], object],
) -> Float32[np.ndarray, "n d"]:  # fmt: skip
    """Return the vectors of all pictures (n, D); blocks in `folder` are kept. `scale` is the name and µm/px of tiles.

    Raises: CohortError for a picture that cannot be read; CheckpointError for vectors that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = []
    for first in range(0, len(pictures), BLOCK):
        path = folder / f"{first:08d}.npy"
        if not path.is_file():
            found = np.stack([_vector(p, mpp, encoder, scale) for p in pictures[first : first + BLOCK]])
            with replacing(path) as partial, partial.open("wb") as file:
                np.save(file, found)
            say(f"{min(first + BLOCK, len(pictures))} of {len(pictures)} pictures are encoded.")
        blocks.append(np.load(path, allow_pickle=False))
    return np.concatenate(blocks)


def _vector(picture: Picture, mpp: float, encoder: TileEncoder, scale: tuple[str, float]) -> NDArray[np.float32]:
    coords, images = tiles_of(picture.path, mpp, scale[1])
    return encoder.encode(TilePixels(picture.path.stem, scale[0], coords, images)).mean(axis=0)
