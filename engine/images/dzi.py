"""Deep Zoom (DZI) for web viewers such as OpenSeadragon: name.dzi and, beside it, the folder name_files.

Levels halve down to one px; tiles of 254 px and one px of each neighbour. The format has no room for a scale, so that
name_files/provenance.json holds µm/px and provenance. Source: Deep Zoom file format, Microsoft 2008.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from engine.core.files import remove, replacing_folder, write_atomically
from engine.core.streaming import BandReader, ReadRows
from engine.images.ome_zarr import CHUNK_PX, halve
from engine.images.pyramid import Picture, labelled, to_pil

DZI_TILE_PX = 254
_OVERLAP_PX = 1
PROVENANCE_FILE = "provenance.json"
_DESCRIPTOR = """<?xml version="1.0" encoding="UTF-8"?>
<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="{format}" Overlap="{overlap}" TileSize="{tile}">
  <Size Height="{height}" Width="{width}"/>
</Image>
"""


def tiles_folder(path: Path) -> Path:
    """Return where the tiles of name.dzi lie. Raises ValueError for another ending."""
    if path.suffix != ".dzi":
        raise ValueError(f"the name of a Deep Zoom picture must end in .dzi; got {path.name}.")
    return path.with_name(path.stem + "_files")


def write_dzi(
    path: Path, picture: Picture, compression: Literal["jpeg", "deflate"] = "jpeg", jpeg_quality: int = 90
) -> None:
    """Write a Deep Zoom pyramid, in tiles of JPEG or (deflate) PNG; name.dzi comes last, so it names whole tiles.

    Raises: ValueError unless the path ends in .dzi; CanvasError if the disk refuses, the picture is damaged, or a
    folder at name_files is not of this kind; a pyramid that was there then still stands.
    """
    suffix = "jpeg" if compression == "jpeg" else "png"
    height, width = picture.sizes[0]
    deepest = (max(height, width) - 1).bit_length()
    with replacing_folder(tiles_folder(path), (PROVENANCE_FILE,), needed=4 * height * width) as partial:
        for depth, size, read in _levels(picture, deepest):
            _write_level(partial / str(depth), size, read, suffix, jpeg_quality)
        (partial / PROVENANCE_FILE).write_text(json.dumps(labelled(picture), indent=1, sort_keys=True) + "\n")
        remove(path)  # from here on until the new one is written there is no picture, rather than a mixed one
    text = _DESCRIPTOR.format(format=suffix, overlap=_OVERLAP_PX, tile=DZI_TILE_PX, height=height, width=width)
    write_atomically(path, text.encode())


def _levels(picture: Picture, deepest: int) -> Iterator[tuple[int, tuple[int, int], ReadRows]]:
    """Yield (number, (h, w), rows) from the full size (`deepest`) to one px (0)."""
    count = len(picture.sizes)
    for level, size in enumerate(picture.sizes):
        yield deepest - level, size, BandReader(_reader(picture, level), size[0], CHUNK_PX)
    pixels = picture.read(0, picture.sizes[-1][0], level=count - 1)
    for depth in range(deepest - count, -1, -1):
        pixels = halve(pixels)
        yield depth, (pixels.shape[1], pixels.shape[2]), _rows_of(pixels)


def _reader(picture: Picture, level: int) -> ReadRows:
    return lambda y0, y1: picture.read(y0, y1, level=level)


def _rows_of(pixels: np.ndarray) -> ReadRows:
    return lambda y0, y1: pixels[:, y0:y1]


def _write_level(folder: Path, size: tuple[int, int], read: ReadRows, suffix: str, quality: int) -> None:
    """Write the tiles of a level as column_row.suffix; memory holds a few rows of chunks."""
    folder.mkdir()
    height, width = size
    options = {"quality": quality, "subsampling": "4:2:0"} if suffix == "jpeg" else {}
    for row, (y0, y1) in enumerate(_spans(height)):
        rows = read(y0, y1)
        for column, (x0, x1) in enumerate(_spans(width)):
            to_pil(rows[:, :, x0:x1]).save(folder / f"{column}_{row}.{suffix}", **options)


def _spans(size: int) -> list[tuple[int, int]]:
    """Return the first and last px of each tile along an axis, neighbours' px included."""
    starts = range(0, size, DZI_TILE_PX)
    return [(max(s - _OVERLAP_PX, 0), min(s + DZI_TILE_PX + _OVERLAP_PX, size)) for s in starts]
