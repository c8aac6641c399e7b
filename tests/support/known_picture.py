"""A picture whose pixels are known, and a disk that is full."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine.images.ome_zarr import CHUNK_PX, Image

HEIGHT, WIDTH = 1300, 900
PROVENANCE = {"model": "demo", "digest": "ab12", "seed": 7}


def pixels_of(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth waves, and a black corner of a whole chunk, which zarr would not store by itself."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(y / 60 + k) * np.cos(x / (50 + 9 * k)) for k in range(3)]
    pixels = np.stack(waves).astype(np.uint8)
    pixels[:, :CHUNK_PX, :CHUNK_PX] = 0
    return pixels


PIXELS = pixels_of()


def image_of(path: Path, mpp_um: float = 0.5) -> Image:
    rows = (PIXELS[:, y : y + 100] for y in range(0, HEIGHT, 100))
    return Image.of_rows(path, rows, (HEIGHT, WIDTH), mpp_um, "test", PROVENANCE)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let the kernel refuse files above a size, as a full disk or quota refuses them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
