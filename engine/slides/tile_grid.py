"""Lay the grid of 5x tiles and their 20x children over the tissue, and read both scales at once.

Invariant: every kept 20x tile has a kept 5x parent whose field contains it, one of 4 × 4. The grid is planned from
sizes and a tissue mask alone. Pixels come later, one read per parent: 1024 × 1024 px at 20x are its 16 children, and
their mean over 4 × 4 px is the parent. Fields are exact in µm on both axes; stored corners are rounded to whole
level-0 px. It does not know models or files of features.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.core.errors import SlideError
from engine.core.units import TILE_PX
from engine.slides.slide import Slide
from engine.slides.tissue import TissueMask

PARENT_FACTOR = 4
"""20x tiles per 5x tile on each axis."""
MOSAIC_PX = TILE_PX * PARENT_FACTOR
MAX_ENLARGEMENT = 1.15
"""A slide scanned at up to 0.575 µm/px still counts as 20x; a coarser one would have to be made up."""


@dataclass(frozen=True)
class GridConfig:
    """Which tiles are kept."""

    mpp: float = 0.5
    """µm/px of the fine tiles (20x); parents have 4 times that."""
    min_tissue: float = 0.25
    """A 20x tile is kept when at least this share of its field is tissue; a 5x tile when any of its children is."""
    edge: Literal["drop", "pad"] = "pad"
    """At the right and lower edge of the slide. drop: a 20x tile must lie wholly on the slide. pad: what lies beyond
    counts as glass, and is white and invalid in the pixels. Parents may reach beyond the edge either way, or their
    children would be lost."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise ValueError(f"mpp must be positive (µm/px); got {self.mpp}. 20x is 0.5.")
        if not 0 < self.min_tissue <= 1:
            raise ValueError(
                f"min_tissue must lie in (0, 1], a share of the tile; got {self.min_tissue}. 0.25 is usual."
            )
        if self.edge not in ("drop", "pad"):
            raise ValueError(f"edge must be drop or pad; got {self.edge!r}.")


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a slide; children are sorted by parent, then row by row, parents row by row."""

    mpp: float
    """µm/px of the 20x tiles."""
    coords: NDArray[np.int64]
    """(N, 2) x, y of the 20x tiles: level-0 px, top left corner, rounded."""
    tissue: NDArray[np.float32]
    """(N,) share of tissue."""
    parent: NDArray[np.int64]
    """(N,) row of the enclosing 5x tile."""
    cell: NDArray[np.int64]
    """(N,) place in the parent, 0 … 15, row by row."""
    parent_coords: NDArray[np.int64]
    """(P, 2) x, y of the 5x tiles."""
    parent_tissue: NDArray[np.float32]
    """(P,) share of tissue."""
    field: tuple[float, float]
    """Level-0 px (x, y) a 20x tile covers; a 5x tile covers 4 times that."""

    def __len__(self) -> int:
        return len(self.coords)

    def children(self, parent: int) -> slice:
        """Return which rows of `coords` are the children of a 5x tile."""
        first, last = np.searchsorted(self.parent, [parent, parent + 1])
        return slice(int(first), int(last))


@dataclass(frozen=True)
class ParentPixels:
    """The pixels of one 5x tile and of its n kept children, from one read."""

    parent: NDArray[np.uint8]
    """(256, 256, 3)."""
    children: NDArray[np.uint8]
    """(n, 256, 256, 3), in the order of the grid."""
    parent_valid: float
    """Share of the parent's px that came from the file, undamaged."""
    children_valid: NDArray[np.float32]
    """(n,) the same for the children."""
    damaged: int
    """Blocks of the file under the parent that could not be decoded."""


def plan_grid(slide: Slide, tissue: TissueMask, config: GridConfig) -> TileGrid:
    """Return the tiles on the tissue; none if there is no tissue.

    Raises: SlideError `too_coarse` if the slide would have to be enlarged by more than MAX_ENLARGEMENT.
    """
    check_fine_enough(slide, config.mpp)
    field = slide.field(TILE_PX, config.mpp)
    columns, rows = (math.ceil(n / f - 1e-6) for n, f in zip((slide.width, slide.height), field, strict=True))
    # Parents lie on a grid that starts at the slide's corner, so that tiles of the file are cut as rarely as can be.
    x, y = np.arange(columns) * field[0], np.arange(rows) * field[1]
    share = tissue.share(x[None, :], y[:, None], *field)
    kept = share >= config.min_tissue
    if config.edge == "drop":
        # A tile counts as inside up to half a px of rounding.
        kept &= (x[None, :] + field[0] <= slide.width + 0.5) & (y[:, None] + field[1] <= slide.height + 0.5)
    row, column = np.nonzero(kept)
    across = -(-columns // PARENT_FACTOR)
    parent_id = row // PARENT_FACTOR * across + column // PARENT_FACTOR
    order = np.lexsort((column, row, parent_id))
    row, column, parent_id = row[order], column[order], parent_id[order]
    ids, parent = np.unique(parent_id, return_inverse=True)
    wide = field[0] * PARENT_FACTOR, field[1] * PARENT_FACTOR
    parent_x, parent_y = ids % across * wide[0], ids // across * wide[1]
    parent_coords = np.rint(np.stack([parent_x, parent_y], axis=1)).astype(np.int64)
    # Children count from their parent's whole corner, where the pixels will be read.
    cell_xy = np.stack([column % PARENT_FACTOR, row % PARENT_FACTOR], axis=1) * np.array(field)
    corners = parent_coords[parent] + cell_xy
    return TileGrid(
        mpp=config.mpp,
        coords=np.rint(corners).astype(np.int64),
        tissue=share[row, column].astype(np.float32),
        parent=parent.astype(np.int64),
        cell=(row % PARENT_FACTOR * PARENT_FACTOR + column % PARENT_FACTOR).astype(np.int64),
        parent_coords=parent_coords,
        parent_tissue=tissue.share(parent_x, parent_y, *wide).astype(np.float32),
        field=field,
    )


def check_fine_enough(slide: Slide, mpp: float) -> None:
    """Refuse a slide that is coarser than the tiles. Raises SlideError `too_coarse`."""
    if max(slide.resolution.mpp_x, slide.resolution.mpp_y) > mpp * MAX_ENLARGEMENT:
        raise SlideError(
            "too_coarse",
            f"{slide.name}: for tiles of {mpp:g} µm/px a slide must have at most {mpp * MAX_ENLARGEMENT:.4g} µm/px; it "
            f"has {slide.resolution.mpp_x:.4g} x {slide.resolution.mpp_y:.4g} ({slide.resolution.source}). Detail "
            "that was not scanned cannot be read; leave the slide out, or correct its µm/px in the overrides table.",
        )


def read_parent(slide: Slide, grid: TileGrid, parent: int) -> ParentPixels:
    """Read one 5x tile and its children. Raises SlideError `vanished` if the file cannot be read any more."""
    x, y = (float(v) for v in grid.parent_coords[parent])
    region = slide.read(x, y, MOSAIC_PX, MOSAIC_PX, grid.mpp)
    cells = grid.cell[grid.children(parent)]
    reduced = np.asarray(Image.fromarray(region.pixels).reduce(PARENT_FACTOR))
    valid = cut_mosaic(region.valid)[cells].mean(axis=(1, 2))
    return ParentPixels(
        parent=reduced,
        children=np.ascontiguousarray(cut_mosaic(region.pixels)[cells]),
        parent_valid=float(region.valid.mean()),
        children_valid=valid.astype(np.float32),
        damaged=region.damaged,
    )


def cut_mosaic(mosaic: NDArray) -> NDArray:  # type: ignore[type-arg]
    """Return the mosaic (1024, 1024, ...) as its tiles (16, 256, 256, ...), row by row."""
    n, rest = PARENT_FACTOR, mosaic.shape[2:]
    return mosaic.reshape(n, TILE_PX, n, TILE_PX, *rest).swapaxes(1, 2).reshape(n * n, TILE_PX, TILE_PX, *rest)
