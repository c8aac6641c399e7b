"""What one worker does for a slide and for one block of it: plan, read, encode. Coordinates travel, then pixels.

Invariant: the vectors of a block depend on its pixels and the settings alone, so blocks may be cut, ordered, repeated
and spread in any way. A slide that cannot be used becomes a `SlideFailure`, never an exception that stops the others.
It does not know run folders, bags on disk or Ray.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import CheckpointError, EngineError, SlideError
from engine.core.units import TILE_PX
from engine.features.config import ExtractConfig
from engine.features.tile_encoders import DiffusionEncoder, TileEncoder, TilePixels, cell_grids, encode_all
from engine.pipeline.stages import BlockResult, Passing, SlideFailure, SlidePlan
from engine.slides.backends.choice import ONLY, Choice
from engine.slides.geojson import tissue_of
from engine.slides.resolution import Resolution, read_overrides
from engine.slides.slide import OpenSlides, Slide
from engine.slides.thumbnail import draw_thumbnail
from engine.slides.tile_grid import PARENT_FACTOR, ParentPixels, TileGrid, check_fine_enough, plan_grid, read_parent
from engine.slides.tissue import TissueMask, check_seen, read_overview

Ranges = Sequence[tuple[int, int]]
"""Rows [start, stop)."""


@dataclass(frozen=True)
class ExtractTask:
    """A slide to do, and what of it is done."""

    slide: str
    path: Path
    written: tuple[Mapping[str, Ranges], ...] = ()
    """For each encoder whose bag is not finished: the rows it has, by scale."""


@dataclass(frozen=True)
class ExtractPlan(SlidePlan):
    """What is known of a slide before it is encoded."""

    slide: str
    path: Path
    reader: str
    size: tuple[int, int]
    """Level-0 px, (width, height)."""
    resolution: Resolution
    objective: float | None
    grid: TileGrid
    tissue: TissueMask
    thumbnail: bytes
    """JPEG with tissue and tiles."""
    blocks: tuple[tuple[int, int], ...]
    """Parents [start, stop) of each block to come."""
    seconds: float
    choice: Choice = ONLY
    """Which picture of the file it is."""
    damaged: int = 0
    """Blocks of the file that could not be decoded while tissue was looked for."""

    @property
    def to_come(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class TileBlock:
    """Some 5x tiles of a slide and their children: where they are."""

    slide: str
    path: Path
    size: tuple[int, int]
    grid: TileGrid
    """Of these tiles alone."""
    first_parent: int
    """Row of the first 5x tile in the slide's grid."""
    first_child: int


@dataclass(frozen=True)
class BlockPixels:
    """The pixels of a block, from one read."""

    block: TileBlock
    fine: TilePixels
    coarse: TilePixels
    cells: NDArray[np.uint8] | None
    """(P, 4, 4, 3, 256, 256): all cells of the parents, without tissue too; only if they condition the model."""
    damaged: int
    """Blocks of the file that could not be decoded."""
    seconds: float


@dataclass(frozen=True)
class BlockFeatures(BlockResult):
    """The vectors of a block."""

    slide: str
    first: Mapping[str, int]
    """Scale → the row of the first tile."""
    vectors: Mapping[str, Mapping[str, NDArray[np.float32]]]
    """Encoder → scale → (n, D)."""
    valid: Mapping[str, NDArray[np.bool_]]
    damaged: int
    read_s: float
    encode_s: float
    waited_s: float = 0.0

    @property
    def tiles(self) -> int:
        return sum(len(valid) for valid in self.valid.values())


def cut(
    grid: TileGrid, written: Sequence[Mapping[str, Ranges]], names: tuple[str, str], size: int
) -> list[tuple[int, int]]:
    """Return the parents [start, stop) of the blocks that still miss a row in one of `written`."""
    rows, parents = len(grid), len(grid.parent_coords)
    missing = np.zeros(parents, np.bool_)
    for done in written:
        fine, coarse = np.ones(rows, np.bool_), np.ones(parents, np.bool_)
        for flags, name in ((fine, names[0]), (coarse, names[1])):
            for start, stop in done.get(name, ()):
                flags[start:stop] = False
        missing |= coarse
        missing[grid.parent[fine]] = True
    edges = [(start, min(start + size, parents)) for start in range(0, parents, size)]
    return [(start, stop) for start, stop in edges if missing[start:stop].any()]


class SlideWorker:
    """Plans and reads slides in one process; keeps some open."""

    def __init__(self, config: ExtractConfig, names: tuple[str, str], given: Sequence[Slide] = ()) -> None:
        """`names` are the magnifications, fine and coarse; `given` slides are open already, others are files.

        Raises EngineError for a bad table of overrides.
        """
        overrides = None if config.overrides is None else read_overrides(Path(config.overrides))
        self._config, self._names = config, names
        self._slides = OpenSlides(overrides, config.mpp, series=config.series, given=given)
        self._whole = "zoomldm" in config.encoders and config.features.condition == "own"

    def plan(self, task: ExtractTask) -> Iterator[Passing | TileBlock]:
        """Yield the plan of a slide and then its blocks, or a failure."""
        start = time.perf_counter()
        try:
            slide = self._slides.get(task.path)
            check_fine_enough(slide, self._config.grid.mpp)  # its overview may be larger than any memory
            overview = read_overview(slide, self._config.finder.mpp)
            tissue = tissue_of(slide, overview, self._config.finder, self._config.tissue)
            check_seen(slide, tissue.lost, self._config.blocks.slide_damage)
            grid = plan_grid(slide, tissue, self._config.grid)
        except EngineError as error:
            yield SlideFailure(task.slide, task.path, getattr(error, "code", "bad_tissue"), str(error))
            return
        size = slide.width, slide.height
        blocks = tuple(cut(grid, task.written, self._names, self._config.blocks.parents))
        thumbnail = draw_thumbnail(overview, tissue, grid)
        seconds = time.perf_counter() - start
        yield ExtractPlan(task.slide, task.path, slide.reader, size, slide.resolution, slide.objective, grid, tissue,
                          thumbnail, blocks, seconds, slide.choice, overview.damaged)  # fmt: skip
        for first, stop in blocks:
            yield TileBlock(task.slide, task.path, size, _part(grid, first, stop), first, grid.children(first).start)

    def read(self, block: TileBlock) -> BlockPixels | SlideFailure:
        """Read the pixels of a block."""
        start = time.perf_counter()
        grid = _all_cells(block.grid) if self._whole else block.grid
        try:
            slide = self._slides.get(block.path)
            pixels = [read_parent(slide, grid, i) for i in range(len(grid.parent_coords))]
        except SlideError as error:
            return SlideFailure(block.slide, block.path, error.code, str(error))
        children = np.concatenate([p.children for p in pixels]).transpose(0, 3, 1, 2)
        damage = np.concatenate([_damage(grid, i, p, block.size) for i, p in enumerate(pixels)])
        cells = None
        if self._whole:
            cells = np.ascontiguousarray(children).reshape(-1, PARENT_FACTOR, PARENT_FACTOR, 3, TILE_PX, TILE_PX)
            kept = block.grid.parent * PARENT_FACTOR**2 + block.grid.cell
            children, damage = children[kept], damage[kept]
        parents = np.stack([p.parent for p in pixels]).transpose(0, 3, 1, 2)
        whole = np.concatenate([_damage(grid, i, p, block.size, of_parent=True) for i, p in enumerate(pixels)])
        limit, (fine, coarse) = self._config.blocks.tile_damage, self._names
        return BlockPixels(
            block,
            TilePixels(block.slide, fine, block.grid.coords, np.ascontiguousarray(children), damage <= limit),
            TilePixels(block.slide, coarse, grid.parent_coords, np.ascontiguousarray(parents), whole <= limit),
            cells,
            sum(p.damaged for p in pixels),
            time.perf_counter() - start,
        )


def _part(grid: TileGrid, first: int, stop: int) -> TileGrid:
    """Return the grid of some parents."""
    rows = slice(grid.children(first).start, grid.children(stop - 1).stop)
    return replace(
        grid,
        coords=grid.coords[rows],
        tissue=grid.tissue[rows],
        parent=grid.parent[rows] - first,
        cell=grid.cell[rows],
        parent_coords=grid.parent_coords[first:stop],
        parent_tissue=grid.parent_tissue[first:stop],
    )


def _all_cells(grid: TileGrid) -> TileGrid:
    """Return the grid with all 16 children of each parent, whatever their tissue."""
    parents, each = len(grid.parent_coords), PARENT_FACTOR**2
    cell = np.tile(np.arange(each), parents)
    corner = np.stack([cell % PARENT_FACTOR, cell // PARENT_FACTOR], axis=1) * np.array(grid.field)
    parent = np.repeat(np.arange(parents), each)
    coords = np.rint(grid.parent_coords[parent] + corner).astype(np.int64)
    return replace(grid, coords=coords, tissue=np.zeros(len(cell), np.float32), parent=parent, cell=cell)


def _damage(
    grid: TileGrid, parent: int, pixels: ParentPixels, size: tuple[int, int], of_parent: bool = False
) -> NDArray[np.float64]:
    """Return the damaged share of a parent's children, or of itself; what lies beyond the slide is not damage."""
    rows = grid.children(parent)
    corner = grid.parent_coords[parent : parent + 1] if of_parent else grid.coords[rows]
    valid = np.array([pixels.parent_valid]) if of_parent else pixels.children_valid
    if not pixels.damaged:
        return np.zeros(len(valid))
    field = np.array(grid.field) * (PARENT_FACTOR if of_parent else 1)
    inside = np.clip(np.minimum(corner + field, size) - np.maximum(corner, 0), 0, None) / field
    return np.clip(inside.prod(axis=1) - valid, 0, 1)


@dataclass
class BlockEncoder:
    """Encodes blocks with one or several networks; lives as long as its process."""

    encoders: Sequence[TileEncoder]
    _free_since: float | None = field(default=None, init=False)

    def encode(self, pixels: BlockPixels) -> BlockFeatures | SlideFailure:
        """Return the vectors of both scales of a block."""
        start, block = time.perf_counter(), pixels.block
        waited = 0.0 if self._free_since is None else start - self._free_since
        try:
            scales = self._with_cells(pixels)
            found = {tiles.scale: encode_all(self.encoders, tiles) for tiles in scales}
        except CheckpointError as error:
            return SlideFailure(block.slide, block.path, "not_finite", str(error))
        self._free_since = time.perf_counter()
        return BlockFeatures(
            slide=block.slide,
            first={pixels.fine.scale: block.first_child, pixels.coarse.scale: block.first_parent},
            vectors={e.id: {scale: found[scale][e.id] for scale in found} for e in self.encoders},
            valid={t.scale: np.ones(len(t.coords), np.bool_) if t.valid is None else t.valid for t in scales},
            damaged=pixels.damaged,
            read_s=pixels.seconds,
            encode_s=self._free_since - start,
            waited_s=waited,
        )

    def _with_cells(self, pixels: BlockPixels) -> tuple[TilePixels, TilePixels]:
        """Add the SSL vectors of the cells under each tile, computed once for both scales, where they are wanted."""
        ssl = next((e.ssl for e in self.encoders if isinstance(e, DiffusionEncoder)), None)
        if pixels.cells is None or ssl is None:
            return pixels.fine, pixels.coarse
        grids, grid = cell_grids(ssl, pixels.cells), pixels.block.grid
        own = grids[grid.parent, :, grid.cell // PARENT_FACTOR, grid.cell % PARENT_FACTOR]
        return replace(pixels.fine, cells=own[:, :, None, None]), replace(pixels.coarse, cells=grids)
