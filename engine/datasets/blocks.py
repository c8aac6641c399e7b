"""What one worker does for a slide of a training set and for one block of it: plan, read, encode.

Invariant: latents and vectors of a block depend on its pixels and the settings alone, so blocks may be ordered,
repeated and spread in any way. Coarse patches are read from reduced levels; where a file has none, in small pieces.
It does not know the set on disk or Ray.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.errors import CheckpointError, EngineError, SlideError
from engine.core.units import TILE_PX
from engine.datasets.config import SQUARE, PrepareConfig
from engine.datasets.networks import load_networks
from engine.datasets.plan import PatchBlock, cut_blocks, plan_patches, source_digest
from engine.datasets.schema import LATENT_SHAPE, SlideFacts
from engine.datasets.writer import PatchPlan
from engine.model.encoders.base import SSLEncoder
from engine.model.zoomldm import ZoomLDM
from engine.pipeline.stages import BlockResult, Passing, SlideFailure, SlidePlan
from engine.slides.backends.choice import Choice
from engine.slides.geojson import tissue_of
from engine.slides.resolution import Resolution, read_overrides
from engine.slides.slide import OpenSlides, Region, Slide
from engine.slides.thumbnail import draw_outlines
from engine.slides.tile_grid import check_fine_enough
from engine.slides.tissue import Overview, TissueMask, check_seen, read_overview

PIECE_PX = 2048
"""Px of a level that are held on each axis while a coarse patch is read."""
OVERVIEW_FACTOR = 16
"""Of the overview of a picture without tissue, in base px."""


@dataclass(frozen=True)
class PrepareTask:
    """A slide to do, and what of it is done."""

    slide: str
    path: Path
    plan_digest: str = ""
    """Of the plan whose blocks are written."""
    done: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PreparedPlan(SlidePlan):
    """What is known of a slide before it is encoded."""

    slide: str
    path: Path
    facts: SlideFacts
    patches: PatchPlan
    tissue_share: float
    thumbnail: bytes
    """JPEG with tissue and patches."""
    blocks: tuple[int, ...]
    """Blocks to come."""
    seconds: float
    choice: Choice
    """Which picture of the file it is."""
    resolution: Resolution
    unseen: float
    """Share of the slide that damage hid from the search for tissue."""

    @property
    def to_come(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class PatchPixels:
    """The pixels of a block."""

    block: PatchBlock
    images: NDArray[np.uint8]
    """(n, 256, 256, 3)."""
    valid: NDArray[np.bool_]
    """(n,): False where too much is damaged."""
    seconds: float


@dataclass(frozen=True)
class BlockLatents(BlockResult):
    """What training needs of a block; rows that are NaN throughout are damaged."""

    slide: str
    index: int
    magnification: str
    first: int
    latents: NDArray[np.float16]
    """(n, 3, 64, 64), of the patches."""
    cells: tuple[NDArray[np.int32], NDArray[np.float16]] | None
    """Places (m, 2) and SSL vectors (m, D) of the base cells; None for coarser patches."""
    images: NDArray[np.uint8] | None
    """(n, 256, 256, 3) if they are kept."""
    sample: NDArray[np.uint8] | None
    """(256, 256, 3): one patch for the report."""
    read_s: float
    encode_s: float
    waited_s: float = 0.0

    @property
    def tiles(self) -> int:
        return len(self.latents)


class PrepareWorker:
    """Plans and reads slides in one process; keeps some open."""

    def __init__(self, config: PrepareConfig) -> None:
        """Raises EngineError for a bad table of overrides."""
        overrides = None if config.overrides is None else read_overrides(Path(config.overrides))
        self._config = config
        self._slides = OpenSlides(overrides, config.default_mpp, series=config.series)

    def plan(self, task: PrepareTask) -> Iterator[Passing | PatchBlock]:
        """Yield the plan of a slide and then its blocks, or a failure."""
        start = time.perf_counter()
        config = self._config
        try:
            slide = self._slides.get(task.path)
            check_fine_enough(slide, config.scale.base_mpp)
            tissue, picture = self._tissue(slide)
            patches, too_small = plan_patches(slide, tissue, config)
            digest = source_digest(task.path)
        except EngineError as error:
            yield SlideFailure(task.slide, task.path, getattr(error, "code", "bad_tissue"), str(error))
            return
        done = task.done if task.plan_digest == patches.digest else frozenset()
        blocks = [b for b in cut_blocks(patches, config, task.slide, task.path) if b.index not in done]
        at = slide.resolution
        facts = SlideFacts(
            slide=task.slide, path=str(task.path), size=(slide.width, slide.height), mpp=(at.mpp_x, at.mpp_y),
            mpp_source=at.source, source_digest=digest, cells=patches.needed.shape, counts=patches.counts,
            too_small=too_small, images=config.keep_images, synthetic=config.synthetic, reader=slide.reader,
        )  # fmt: skip
        share = 1.0 if tissue is None else tissue.total_share
        field_px, layers = slide.field(TILE_PX, config.scale.base_mpp), []
        for name, colour in ((config.scale.base, (20, 90, 220)), (config.scale.names[-1], (200, 60, 20))):
            k = config.scale.factor(name)
            layers.append((patches.places[name][:, ::-1] * field_px, (field_px[0] * k, field_px[1] * k), colour))
        thumbnail = draw_outlines(picture, tissue, layers)
        seconds = time.perf_counter() - start
        indices = tuple(b.index for b in blocks)
        unseen = 0.0 if tissue is None else tissue.lost
        yield PreparedPlan(
            task.slide, task.path, facts, patches, share, thumbnail, indices, seconds, slide.choice, at, unseen
        )  # fmt: skip
        yield from blocks

    def _tissue(self, slide: Slide) -> tuple[TissueMask | None, Overview]:
        """Return the tissue of a slide, None for all of it, and its overview. Raises EngineError.

        Collars, which nodata or a mask tells, are no part of a picture whose every px counts.
        """
        config = self._config
        if config.everything:
            overview = read_overview(slide, config.scale.base_mpp * OVERVIEW_FACTOR)
            there = TissueMask(~overview.empty, overview.scale, (slide.width, slide.height))
            return (None if there.mask.all() else there), overview
        overview = read_overview(slide, config.finder.mpp)
        tissue = tissue_of(slide, overview, config.finder, config.tissue)
        check_seen(slide, tissue.lost, config.blocks.slide_damage)
        return tissue, overview

    def read(self, block: PatchBlock) -> PatchPixels | SlideFailure:
        """Read the pixels of a block."""
        start, mpp = time.perf_counter(), self._config.scale.mpp(block.magnification)
        try:
            slide = self._slides.get(block.path)
            if block.is_base:
                images, valid = _read_cells(slide, block.places, mpp)
            else:
                field_px = np.array(slide.field(TILE_PX, self._config.scale.base_mpp))
                parts = [read_patch(slide, float(x), float(y), mpp) for x, y in block.places[:, ::-1] * field_px]
                images, valid = np.stack([p.pixels for p in parts]), np.array([_valid_share(p) for p in parts])
        except SlideError as error:
            return SlideFailure(block.slide, block.path, error.code, str(error))
        whole = valid >= 1 - self._config.blocks.tile_damage
        return PatchPixels(block, images, whole, time.perf_counter() - start)


def _read_cells(slide: Slide, cells: NDArray[np.int32], mpp: float) -> tuple[NDArray[np.uint8], NDArray[np.floating]]:
    """Read base cells, one read per square of SQUARE × SQUARE: pixels (n, 256, 256, 3) and valid shares (n,)."""
    images = np.empty((len(cells), TILE_PX, TILE_PX, 3), np.uint8)
    valid = np.empty(len(cells))
    field_px = slide.field(TILE_PX, mpp)
    squares, member = np.unique(cells // SQUARE, axis=0, return_inverse=True)
    for number in range(len(squares)):
        rows = np.flatnonzero(member.ravel() == number)
        (top, left), (bottom, right) = cells[rows].min(axis=0), cells[rows].max(axis=0) + 1
        size = int(right - left) * TILE_PX, int(bottom - top) * TILE_PX
        region = slide.read(float(left * field_px[0]), float(top * field_px[1]), *size, mpp)
        for row in rows:
            y, x = (cells[row] - (top, left)) * TILE_PX
            where = np.s_[y : y + TILE_PX, x : x + TILE_PX]
            images[row] = region.pixels[where]
            # What the file leaves out, as scanners do with glass, is not damage.
            valid[row] = region.valid[where].mean() if region.damaged else 1.0
    return images, valid


def read_patch(slide: Slide, x: float, y: float, mpp: float) -> Region:
    """Read 256 × 256 px of `mpp` µm/px with the corner at level-0 px (x, y), at most PIECE_PX² px of a level at once.

    Raises: SlideError `vanished`.
    """
    scale = slide.scales[slide.level_for(mpp)]
    field_px = slide.field(1, mpp)
    each = max(field_px[0] / scale[1], field_px[1] / scale[0])
    piece = next(n for n in (256, 128, 64, 32, 16, 8, 4, 2, 1) if n * each <= PIECE_PX or n == 1)
    if piece == TILE_PX:
        return slide.read(x, y, TILE_PX, TILE_PX, mpp)
    pixels, valid, damaged = np.empty((TILE_PX, TILE_PX, 3), np.uint8), np.empty((TILE_PX, TILE_PX), np.bool_), 0
    for row in range(0, TILE_PX, piece):
        for column in range(0, TILE_PX, piece):
            part = slide.read(x + column * field_px[0], y + row * field_px[1], piece, piece, mpp)
            where = np.s_[row : row + piece, column : column + piece]
            pixels[where], valid[where] = part.pixels, part.valid
            damaged += part.damaged
    return Region(pixels, valid, damaged)


def _valid_share(region: Region) -> float:
    return float(region.valid.mean()) if region.damaged else 1.0


@dataclass
class PatchEncoder:
    """Encodes blocks with an autoencoder and an SSL encoder; lives as long as its process."""

    model: ZoomLDM
    ssl: SSLEncoder
    batch: int
    keep_images: bool
    _free_since: float | None = field(default=None, init=False)

    def encode(self, pixels: PatchPixels) -> BlockLatents | SlideFailure:
        """Return latents of the patches and vectors of the cells of a block."""
        start, block = time.perf_counter(), pixels.block
        waited = 0.0 if self._free_since is None else start - self._free_since
        try:
            images, valid = pixels.images[block.kept], pixels.valid[block.kept]
            latents = self._in_batches(images, valid, self._latents, LATENT_SHAPE, "autoencoder")
            cells = None
            if block.is_base:
                vectors = self._in_batches(pixels.images, pixels.valid, self.ssl.encode, (self.ssl.dim,), "SSL encoder")
                cells = block.places, vectors
        except CheckpointError as error:
            return SlideFailure(block.slide, block.path, "not_finite", f"{block.slide}: {error}")
        self._free_since = time.perf_counter()
        shown = np.flatnonzero(valid)
        return BlockLatents(
            block.slide, block.index, block.magnification, block.first, latents, cells,
            images if self.keep_images else None,
            np.array(images[shown[len(shown) // 2]]) if len(shown) else None,
            pixels.seconds, self._free_since - start, waited,
        )  # fmt: skip

    def _latents(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model.encode(images.float() / 127.5 - 1)

    def _in_batches(
        self, images: NDArray[np.uint8], valid: NDArray[np.bool_], compute: Callable[[Tensor], Tensor],
        shape: tuple[int, ...], who: str,
    ) -> NDArray[np.float16]:  # fmt: skip
        """Evaluate the valid images in batches of one shape (the last one filled up); the others become NaN.

        Raises: CheckpointError if the network returns what float16 does not hold.
        """
        found = np.full((len(images), *shape), np.nan, np.float16)
        rows = np.flatnonzero(valid)
        for first in range(0, len(rows), self.batch):
            chosen = rows[first : first + self.batch]
            filled = np.concatenate([chosen, np.repeat(chosen[:1], self.batch - len(chosen))])
            batch = torch.from_numpy(np.ascontiguousarray(images[filled].transpose(0, 3, 1, 2)))
            with np.errstate(over="ignore"):
                answer = compute(batch).float().cpu().numpy()[: len(chosen)].astype(np.float16)
            if not np.isfinite(answer).all():
                raise CheckpointError(
                    f"the {who} must return finite numbers below 65504; it gave others. Use float32, or check the "
                    "weights."
                )
            found[chosen] = answer
        return found


@dataclass(frozen=True)
class PrepareStages:
    """Slides → plans and blocks → pixels → latents and vectors."""

    config: PrepareConfig

    def worker(self) -> PrepareWorker:
        return PrepareWorker(self.config)

    def encoder(self, device: str) -> PatchEncoder:
        model, ssl = load_networks(self.config, device)
        return PatchEncoder(model, ssl, self.config.blocks.batch, self.config.keep_images)
