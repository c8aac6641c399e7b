"""Slides written for tests: a printed ruler on phantom tissue, and pyramids with every odd habit of writers."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from engine.slides.phantom.render import Phantom

STEP_UM, BAR_UM, MARGIN_UM = 100.0, 8.0, 60.0
"""A bar of BAR_UM is centred at each multiple of STEP_UM (0 excepted), on a white margin along two edges."""
METRES = {1024: 1, 3072: 26918, 3076: 9001}
"""GeoTIFF keys of a projected system (UTM 18N) in metres."""


def bars(count: int, mpp: float) -> np.ndarray:
    """Return how much of each px of an axis is bar, exactly."""
    edges = np.arange(count + 1) * mpp
    ticks = np.arange(1, int(edges[-1] / STEP_UM) + 1) * STEP_UM
    covered = sum(np.clip(edges, t - BAR_UM / 2, t + BAR_UM / 2) - t for t in ticks)
    return np.diff(covered) / mpp


@functools.cache
def tissue(height: int, width: int) -> Image.Image:
    """Return phantom tissue at 2 µm/px, rendered once for all tests."""
    return Image.fromarray(Phantom(5).render(2400, 500, height, width, 2.0))


def ruler(mpp: float, width_um: float = 1100.0, height_um: float = 700.0) -> np.ndarray:
    """Return uint8 (h, w, 3): tissue with a ruler along the upper and the left edge."""
    h, w = round(height_um / mpp), round(width_um / mpp)
    part = tissue(350, 550).crop((0, 0, round(width_um / 2), round(height_um / 2)))
    picture = np.array(part.resize((w, h), Image.Resampling.BILINEAR))
    margin = round(MARGIN_UM / mpp)
    picture[:margin] = np.rint(255 * (1 - bars(w, mpp)))[None, :, None]
    picture[:, :margin] = np.rint(255 * (1 - bars(h, mpp)))[:, None, None]
    picture[:margin, :margin] = 255
    return picture


def bar_centres_um(pixels: np.ndarray, mpp: float, first_um: float) -> np.ndarray:
    """Return the centres (µm) of the bars that a row of px (w,) shows whole; px 0 begins at first_um."""
    dark = 1 - pixels.astype(float) / 255
    at = first_um + (np.arange(len(dark)) + 0.5) * mpp
    found = []
    for tick in np.arange(1, 1000) * STEP_UM:
        near = np.abs(at - tick) < STEP_UM / 2 - mpp
        if near.any() and at[0] < tick - 20 and at[-1] > tick + 20:
            found.append((dark[near] * at[near]).sum() / dark[near].sum() - tick)
    return np.array(found)


def box(picture: np.ndarray, factor: int, rounding: str = "down") -> np.ndarray:
    """Reduce by a whole factor; the last px is partial ("up") or left out ("down")."""
    h, w = picture.shape[:2]
    if rounding == "up":
        picture = np.pad(picture, ((0, -h % factor), (0, -w % factor), (0, 0)), mode="edge")
    h, w = picture.shape[0] // factor, picture.shape[1] // factor
    parts = picture[: h * factor, : w * factor].reshape(h, factor, w, factor, 3)
    return np.rint(parts.mean((1, 3))).astype(np.uint8)


def stretched(picture: np.ndarray, factor: float) -> np.ndarray:
    """Reduce by any factor, the whole picture onto whole px: a writer that fits levels to a rounded size."""
    size = int(picture.shape[1] / factor), int(picture.shape[0] / factor)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def write_tiff(
    path: Path,
    levels: Sequence[np.ndarray],
    mpp: float | None,
    compression: str | None = None,
    description: str | None = None,
    tile: int = 256,
    subsampling: tuple[int, int] = (1, 1),
) -> Path:
    """Write levels as top-level pages, as generic TIFF readers expect them."""
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for i, level in enumerate(levels):
            here = None if mpp is None else mpp * levels[0].shape[1] / level.shape[1]
            more: dict[str, Any] = {}
            if compression == "jpeg":
                more = {"compressionargs": {"level": 90}, "subsampling": subsampling}
            tiff.write(
                level,
                photometric="rgb" if level.ndim == 3 else "minisblack",
                tile=(tile, tile),
                compression=compression,
                subfiletype=1 if i else 0,
                resolution=None if here is None else (1e4 / here, 1e4 / here),
                resolutionunit=None if here is None else "CENTIMETER",
                description=description if i == 0 else None,
                metadata=None,
                **more,
            )
    return path


def write_geotiff(
    path: Path, keys: Mapping[int, int], scale: tuple[float, ...] = (0.6, 0.6, 0.0), picture: np.ndarray | None = None
) -> Path:
    """Write a picture from above, or a small grey one, as GDAL does: pixel scale, tie point, keys sorted by number."""
    directory = [1, 1, 0, len(keys), *(n for key, value in sorted(keys.items()) for n in (key, 0, 1, value))]
    tags = [(33550, 12, 3, scale, True), (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 4e6, 0.0), True)]
    tags.append((34735, 3, len(directory), tuple(directory), True))
    picture = np.full((64, 64, 3), 90, np.uint8) if picture is None else picture
    tifffile.imwrite(path, picture, photometric="rgb", metadata=None, extratags=tags)
    return path


def tile_bytes(path: Path, y: int, x: int, page: int = 0) -> tuple[int, int]:
    """Return where the tile over px (y, x) of a page lies in the file: offset, count."""
    with tifffile.TiffFile(path) as tiff:
        found: Any = tiff.pages[page]
        index = y // found.tilelength * -(-found.imagewidth // found.tilewidth) + x // found.tilewidth
        return found.dataoffsets[index], found.databytecounts[index]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Change some bytes of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
