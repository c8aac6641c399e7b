"""One row → one bag without a picture: single patches on the conditions of real tiles, encoded at once.

Each fine tile (20x) is drawn on the SSL vector of the tile of the source at its place, each coarse one (5x) on the 4×4
vectors under it; so a bag of N tiles costs N patches. Invariant: a bag depends on row, settings and weights alone; what
a kill leaves is continued, batch by batch, to the same bytes. It does not know pictures or Ray.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from engine import __version__
from engine.cohort.config import CohortConfig
from engine.cohort.picture import Made, write_thumbnail
from engine.cohort.sources import Embedder, open_reference
from engine.cohort.table import Row, seed_of
from engine.conditions.reference import embedding_grid, read_embeddings
from engine.core.errors import RowError
from engine.core.runtime import choose_device, keep_freed_memory, pin_arithmetic
from engine.core.streaming import Box
from engine.core.units import TILE_PX
from engine.features.bag_reader import BagAttributes, BagPlan, BagScale, bag_path
from engine.features.bag_writer import BagWriter
from engine.features.config import ExtractConfig
from engine.features.encoders import EncoderFacts, describe, load_encoders, scale_names
from engine.features.tile_encoders import DiffusionEncoder, TileEncoder, TilePixels, encode_all
from engine.generation.run import load_model
from engine.model.encoders.base import SSLEncoder
from engine.model.zoomldm import ZoomLDM
from engine.sampling.pixels import to_uint8
from engine.sampling.ssl_grid import extend_grid
from engine.slides.slide import Slide
from engine.slides.tile_grid import MOSAIC_PX, PARENT_FACTOR, cut_mosaic, plan_grid
from engine.slides.tissue import find_tissue

COARSE_FIRST = 2**40
"""Number of the first coarse patch: its noise is not that of a fine one."""
FEWER = "fewer_tiles"
_SHOWN = 8


@dataclass(frozen=True)
class Tiles:
    """Where the tiles of a bag are, and what they are drawn on."""

    coords: NDArray[np.int64]
    """(N, 2): x, y of the fine tiles, level-0 px of the source."""
    parent: NDArray[np.int64]
    """(N,): row of the coarse tile that holds each."""
    parent_coords: NDArray[np.int64]
    """(P, 2)."""
    vectors: NDArray[np.float32]
    """(P, D, 4, 4): SSL vectors of the cells under each coarse tile."""
    cell: NDArray[np.int64]
    """(N,): place of each fine tile in its coarse one, 0 … 15."""
    field: tuple[float, float]
    """Level-0 px a fine tile covers, x and y."""
    mpp: tuple[float, float]
    """µm per level-0 px, x and y."""
    mpp_source: str
    size: tuple[int, int]
    """Level-0 px of the source, (width, height)."""
    pictures: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
    """Where patches begin from the source's own tiles: these, fine and coarse, (n, 256, 256, 3)."""

    @property
    def own(self) -> NDArray[np.float32]:
        """The SSL vector of each fine tile, (N, D, 1, 1)."""
        cells = self.vectors[self.parent, :, self.cell // PARENT_FACTOR, self.cell % PARENT_FACTOR]
        return np.ascontiguousarray(cells[:, :, None, None])


def extract_config(config: CohortConfig) -> ExtractConfig:
    """Return the extraction whose encoders make the vectors."""
    return ExtractConfig(
        slides=config.slides or config.out,
        out=config.out,
        mpp=config.mpp,
        synthetic=True,
        encoders=config.bags.encoders,
        precision=config.bags.precision,
        finder=config.finder,
        grid=config.grid,
        features=config.features,
        model=config.model,
    )


def bag_file(config: CohortConfig, name: str, encoder: str | None = None) -> Path:
    """Return the bag of a row, of the first encoder unless another is named. Raises BagError."""
    first = config.bags.encoders[0]
    return bag_path(Path(config.out) / extract_config(config).folder_of(encoder or first), name)


class BagMaker:
    """Draws and encodes bags in this process; the networks are loaded once, when they are first needed."""

    def __init__(self, config: CohortConfig) -> None:
        """`config` has its dtype settled. Raises: EngineError where encoders and model do not fit together."""
        self.config = config
        self._asked = extract_config(config)
        self.names = scale_names(self._asked)

    @cached_property
    def facts(self) -> Mapping[str, EncoderFacts]:
        """What bags say of each encoder."""
        return describe(self._asked)

    @cached_property
    def _device(self) -> str:
        pin_arithmetic(self.config.model.threads)
        device = choose_device(self.config.model.device)
        keep_freed_memory(device)
        return device

    @cached_property
    def _encoders(self) -> list[TileEncoder]:
        return load_encoders(self._asked, self._device)

    @cached_property
    def model(self) -> ZoomLDM:
        """The model that draws: the encoder's own where it is one."""
        for encoder in self._encoders:
            if isinstance(encoder, DiffusionEncoder):
                return encoder.model
        return load_model(self.config).to(self._device)

    @cached_property
    def _ssl(self) -> SSLEncoder:
        return Embedder(self.config, self.model).encoder

    def make(self, row: Row) -> Made:
        """Make or continue a bag. Raises: RowError, SlideError for what is wrong with this row; EngineError."""
        tiles = self._tiles(row)
        plans = {name: self._plan(row, tiles, facts) for name, facts in self.facts.items()}
        writers = {name: BagWriter(bag_file(self.config, row.name, name), plan) for name, plan in plans.items()}
        fine, coarse = self.names
        pictures = tiles.pictures or (None, None)
        drawn = self._write(row, writers, fine, tiles.coords, tiles.own, 0, pictures[0])
        drawn += self._write(row, writers, coarse, tiles.parent_coords, tiles.vectors, COARSE_FIRST, pictures[1])
        for writer in writers.values():
            writer.finish()
        first = bag_file(self.config, row.name)
        note = message = ""
        if len(tiles.coords) < self.config.bags.tiles:
            note = FEWER
            message = f"{row.name}: {self.config.bags.tiles} tiles were asked for; its source has {len(tiles.coords)}."
        return Made(row.name, f"{first.parent.name}/{first.name}", note, message, drawn)

    def _write(
        self, row: Row, writers: Mapping[str, BagWriter], scale: str, coords: NDArray[np.int64],
        cells: NDArray[np.float32], first: int, sources: NDArray[np.uint8] | None,
    ) -> int:  # fmt: skip
        """Draw and encode the tiles of a magnification that are missing, batch by batch; return how many were drawn."""
        size, index, drawn = self.config.sampling.batch_size, self.model.config.scale.index(scale), 0
        sampler = self.config.bags.sampler(row.seed)
        for start in range(0, len(coords), size):
            stop = min(start + size, len(coords))
            todo = {n: w for n, w in writers.items() if any(a < stop and start < b for a, b in w.missing(scale))}
            if not todo:
                continue
            # Always one shape: another one takes other kernels, whose last bits differ.
            filled = np.minimum(np.arange(start, start + size), stop - 1)
            begun = None if sources is None else _as_images(sources[filled])
            pictures = to_uint8(sampler.draw(self.model, list(cells[filled]), index, first + start, begun))
            kept = np.ascontiguousarray(pictures[: stop - start])
            drawn += len(kept)
            under = cells[start:stop] if scale != self.names[0] else None
            found = encode_all(self._encoders, TilePixels(row.name, scale, coords[start:stop], kept, None, under))
            for name, writer in todo.items():
                writer.write(scale, start, found[name])
            if start == 0 and scale == self.names[0]:
                strip = np.concatenate(list(kept[:_SHOWN].transpose(0, 2, 3, 1)), axis=1)
                write_thumbnail(Path(self.config.out), row.name, Pillow.fromarray(strip).reduce(2), row.origin)
        return drawn

    def _plan(self, row: Row, tiles: Tiles, facts: EncoderFacts) -> BagPlan:
        attributes = BagAttributes(
            slide=row.name,
            mpp_x=tiles.mpp[0],
            mpp_y=tiles.mpp[1],
            mpp_source=tiles.mpp_source,
            level0_width=tiles.size[0],
            level0_height=tiles.size[1],
            reader=f"drawn by zoomldm-engine {__version__}",
            code_version=__version__,
            synthetic=True,
            source_patient=row.source_patient or None,
            source_slide=row.source_slide or None,
            **facts.attributes,
        )
        base, wide = self.config.grid.mpp, (tiles.field[0] * PARENT_FACTOR, tiles.field[1] * PARENT_FACTOR)
        scales = (
            BagScale(self.names[0], base, tiles.field, tiles.coords, tiles.parent),
            BagScale(self.names[1], base * PARENT_FACTOR, wide, tiles.parent_coords),
        )
        return BagPlan(attributes, scales, facts.dim, self.config.bags.precision)

    def _tiles(self, row: Row) -> Tiles:
        if row.embeddings is not None:
            return self._tiles_of_grid(row)
        assert row.reference is not None  # rows of bags are looked up
        slide = open_reference(row.reference, self.config, self.config.grid.mpp)
        try:
            return self._tiles_of_slide(row, slide)
        finally:
            slide.close()

    def _tiles_of_slide(self, row: Row, slide: Slide) -> Tiles:
        """Choose tiles on a slide's tissue and encode what they are drawn on. Raises RowError `no_tiles`."""
        grid = plan_grid(slide, find_tissue(slide, self.config.finder), self.config.grid)
        inside = np.ones(len(grid), bool) if row.region is None else _inside(grid.coords, grid.field, row.region)
        kept, parents = _chosen(row, grid.parent, inside, self.config.bags.tiles)
        vectors, fine, coarse = [], [], []
        for number in parents:
            x, y = (float(v) for v in grid.parent_coords[number])
            mosaic = slide.read(x, y, MOSAIC_PX, MOSAIC_PX, grid.mpp).pixels
            vectors.append(embedding_grid(mosaic, self._ssl))
            if self.config.bags.strength < 1:
                coarse.append(np.asarray(Pillow.fromarray(mosaic).reduce(PARENT_FACTOR)))
                fine.append(cut_mosaic(mosaic)[grid.cell[kept][grid.parent[kept] == number]])
        back = {int(number): i for i, number in enumerate(parents)}
        return Tiles(
            coords=grid.coords[kept],
            parent=np.array([back[int(n)] for n in grid.parent[kept]], np.int64),
            parent_coords=grid.parent_coords[parents],
            vectors=np.stack(vectors),
            cell=grid.cell[kept],
            field=grid.field,
            mpp=(slide.resolution.mpp_x, slide.resolution.mpp_y),
            mpp_source=slide.resolution.source,
            size=(slide.width, slide.height),
            pictures=(np.concatenate(fine), np.stack(coarse)) if fine else None,
        )

    def _tiles_of_grid(self, row: Row) -> Tiles:
        """Take the cells of stored vectors for tiles. Raises RowError `bad_embeddings`."""
        assert row.embeddings is not None
        try:
            stored = read_embeddings(row.embeddings)
        except ValueError as error:
            raise RowError("bad_embeddings", f"{row.name}: {error}") from error
        depth, height, width = stored.shape
        if depth != self.model.config.ssl_dim:
            raise RowError("bad_embeddings", f"{row.name}: the model takes SSL vectors of {self.model.config.ssl_dim} "
                           f"numbers; {row.embeddings} has {depth}. Use the encoder it was trained with.")  # fmt: skip
        n, down, across = PARENT_FACTOR, -(-height // PARENT_FACTOR), -(-width // PARENT_FACTOR)
        whole = extend_grid(stored, down * n, across * n)
        y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
        parent = y // n * across + x // n
        order = np.lexsort((x, y, parent))
        y, x, parent = y[order], x[order], parent[order]
        kept, parents = _chosen(row, parent, np.ones(len(parent), bool), self.config.bags.tiles)
        back = {int(number): i for i, number in enumerate(parents)}
        blocks = whole.reshape(depth, down, n, across, n).transpose(1, 3, 0, 2, 4).reshape(-1, depth, n, n)
        return Tiles(
            coords=np.stack([x[kept], y[kept]], axis=1).astype(np.int64) * TILE_PX,
            parent=np.array([back[int(p)] for p in parent[kept]], np.int64),
            parent_coords=np.stack([parents % across, parents // across], axis=1).astype(np.int64) * (n * TILE_PX),
            vectors=np.ascontiguousarray(blocks[parents]),
            cell=(y[kept] % n * n + x[kept] % n).astype(np.int64),
            field=(float(TILE_PX), float(TILE_PX)),
            mpp=(self.config.grid.mpp, self.config.grid.mpp),
            mpp_source="stored vectors",
            size=(width * TILE_PX, height * TILE_PX),
        )


def _as_images(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return (n, h, w, 3) as (n, 3, h, w) in [−1, 1]."""
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32) / np.float32(127.5) - np.float32(1)


def _inside(coords: NDArray[np.int64], field: tuple[float, float], box: Box) -> NDArray[np.bool_]:
    """Return which tiles lie wholly in a region, up to half a px of rounding."""
    x, y = coords.T
    left, top = x >= box.x0 - 0.5, y >= box.y0 - 0.5
    return left & top & (x + field[0] <= box.x1 + 0.5) & (y + field[1] <= box.y1 + 0.5)


def _chosen(
    row: Row, parent: NDArray[np.integer], inside: NDArray[np.bool_], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return at most `count` rows of fine tiles, of whole coarse ones drawn from the row's seed, and the coarse rows.

    Both ascend. Raises: RowError `no_tiles` if there are none.
    """
    numbers, sizes = np.unique(parent[inside], return_counts=True)
    if not len(numbers):
        raise RowError("no_tiles", f"{row.name}: a bag needs tiles with tissue inside its region; there are none. Name "
                       "another region, or lower grid.min_tissue.")  # fmt: skip
    order = np.random.default_rng([row.seed % 2**63, seed_of("tiles")]).permutation(len(numbers))
    reached = np.searchsorted(np.cumsum(sizes[order]), min(count, int(sizes.sum()))) + 1
    drawn = order[:reached]
    last = numbers[drawn[-1]]
    kept = np.flatnonzero(inside & np.isin(parent, numbers[drawn]))
    surplus = len(kept) - count
    if surplus > 0:
        kept = np.setdiff1d(kept, np.flatnonzero(inside & (parent == last))[-surplus:])
    return kept.astype(np.int64), np.sort(numbers[drawn]).astype(np.int64)
