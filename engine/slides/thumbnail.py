"""A small picture of a slide with the outline of its tissue and the tiles that are kept.

It does not know how tissue is found or where the picture goes.
"""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from engine.slides.tile_grid import PARENT_FACTOR, TileGrid
from engine.slides.tissue import Overview, TissueMask

LONGEST_PX = 1024
LARGEST_ZOOM = 4.0
"""A small slide is enlarged, so that its tiles can be told apart."""
TISSUE = (0, 160, 0)
TILE = (20, 90, 220)
PARENT = (200, 60, 20)


Outlines = tuple[NDArray[np.floating], tuple[float, float], tuple[int, int, int]]
"""Corners (N, 2) x, y and size (x, y) of rectangles in level-0 px, and their colour."""


def draw_thumbnail(overview: Overview, tissue: TissueMask, grid: TileGrid, longest: int = LONGEST_PX) -> bytes:
    """Return a JPEG of at most `longest` px: 20x tiles blue, 5x tiles red, the tissue's outline green."""
    wide = grid.field[0] * PARENT_FACTOR, grid.field[1] * PARENT_FACTOR
    fine, coarse = grid.coords.astype(float), grid.parent_coords.astype(float)
    return draw_outlines(overview, tissue, ((fine, grid.field, TILE), (coarse, wide, PARENT)), longest)


def draw_outlines(
    overview: Overview, tissue: TissueMask | None, layers: Sequence[Outlines], longest: int = LONGEST_PX
) -> bytes:
    """Return a JPEG of at most `longest` px with rectangles and, where it is known, the tissue's outline in green."""
    height, width = overview.valid.shape
    zoom = min(LARGEST_ZOOM, longest / max(height, width))
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    picture = Image.fromarray(overview.pixels).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    # Level-0 px per px of the thumbnail.
    scale = overview.scale[0] * width / size[0], overview.scale[1] * height / size[1]
    for corners, size_px, colour in layers:
        field = size_px[0] / scale[0], size_px[1] / scale[1]
        for x, y in corners / np.array(scale):
            # One px short, so that neighbours do not share a line.
            draw.rectangle((x, y, max(x, x + field[0] - 1), max(y, y + field[1] - 1)), outline=colour)
    pixels = np.array(picture)
    if tissue is not None:
        mask = np.asarray(Image.fromarray(tissue.mask).resize(size, Image.Resampling.NEAREST))
        pixels[mask & ~ndimage.binary_erosion(mask, border_value=1)] = TISSUE
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()
