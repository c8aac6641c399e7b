"""Which patches and cells of a slide a training set takes, and how the work is cut into blocks. Sizes only, no pixels.

Invariant: all patches start on a whole base cell and lie on the slide, so that each covers factor × factor cells; the
plan depends on the slide's size, its tissue and the settings alone.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import SlideError
from engine.core.units import TILE_PX
from engine.datasets.config import SQUARE, PrepareConfig
from engine.datasets.writer import PatchPlan
from engine.slides.slide import Slide
from engine.slides.tissue import TissueMask

_DIGEST_BYTES = 2**20


@dataclass(frozen=True)
class PatchBlock:
    """Some patches of one magnification, or some base cells and the patches among them: where they are."""

    slide: str
    path: Path
    index: int
    """Number of the block in its slide."""
    magnification: str
    places: NDArray[np.int32]
    """(n, 2): first cell (y, x) of each patch; at the base the cells."""
    kept: NDArray[np.bool_]
    """(n,): which are patches; the other cells only have an SSL vector."""
    first: int
    """Row of the first kept patch in the slide's list of its magnification."""
    is_base: bool


def plan_patches(slide: Slide, tissue: TissueMask | None, config: PrepareConfig) -> tuple[PatchPlan, tuple[str, ...]]:
    """Return the patches of a slide, and the magnifications of which one patch is larger than it; `tissue` None is
    everywhere.

    Base patches are ordered by squares of SQUARE × SQUARE cells, others row by row.
    Raises: SlideError `too_small` if not even one base cell fits.
    """
    scale = config.scale
    field = slide.field(TILE_PX, scale.base_mpp)
    # A cell counts as inside up to half a px of rounding.
    h, w = (max(0, math.floor((n + 0.5) / f)) for n, f in zip((slide.height, slide.width), field[::-1], strict=True))
    if not h or not w:
        raise SlideError(
            "too_small",
            f"{slide.name}: a slide must hold one cell of {TILE_PX} px at {scale.base_mpp:g} µm/px; it has "
            f"{slide.width}x{slide.height} px of {slide.resolution.mpp:.4g} µm/px. Leave it out.",
        )
    share = np.ones((h, w))
    if tissue is not None:
        share = tissue.share(np.arange(w)[None, :] * field[0], np.arange(h)[:, None] * field[1], *field)
    total = np.pad(share.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    needed, places, shares = np.zeros((h, w), np.bool_), {}, {}
    for name in scale.names:
        k = scale.factor(name)
        y, x = np.meshgrid(*(np.arange(0, n - k + 1, config.stride(k)) for n in (h, w)), indexing="ij")
        of_patch = (total[y + k, x + k] - total[y, x + k] - total[y + k, x] + total[y, x]) / k**2
        chosen = of_patch >= config.min_tissue - 1e-9
        at, found = np.stack([y[chosen], x[chosen]], axis=1), of_patch[chosen]
        if k == 1:
            order = np.lexsort((at[:, 1], at[:, 0], at[:, 1] // SQUARE, at[:, 0] // SQUARE))
            at, found = at[order], found[order]
        places[name], shares[name] = at.astype(np.int32), np.clip(found, 0, 1).astype(np.float32)
        for row, column in at:
            needed[row : row + k, column : column + k] = True
    too_small = tuple(name for name in scale.names if scale.factor(name) > min(h, w))
    return PatchPlan(needed, places, shares), too_small


def cut_blocks(plan: PatchPlan, config: PrepareConfig, slide: str, path: Path) -> Iterator[PatchBlock]:
    """Yield the blocks of a slide, base first, in an order that depends on the plan alone."""
    base, index = config.scale.base, 0
    cells = np.argwhere(plan.needed)
    if not len(cells):  # a slide of which no patch holds enough tissue
        return
    cells = cells[np.lexsort((cells[:, 1], cells[:, 0], cells[:, 1] // SQUARE, cells[:, 0] // SQUARE))]
    is_patch = np.zeros(plan.needed.shape, np.bool_)
    is_patch[tuple(plan.places[base].T)] = True
    kept = is_patch[tuple(cells.T)]
    before = np.concatenate([[0], np.cumsum(kept)])
    square = cells[:, 0] // SQUARE * plan.needed.shape[1] + cells[:, 1] // SQUARE
    starts = np.flatnonzero(np.diff(square, prepend=-1))[:: config.blocks.patches // SQUARE**2]
    for start, stop in zip(starts, [*starts[1:], len(cells)], strict=True):
        part = slice(int(start), int(stop))
        yield PatchBlock(slide, path, index, base, cells[part].astype(np.int32), kept[part], int(before[start]), True)
        index += 1
    for name, places in plan.places.items():
        for start in range(0, 0 if name == base else len(places), config.blocks.patches):
            some = places[start : start + config.blocks.patches]
            yield PatchBlock(slide, path, index, name, some, np.ones(len(some), np.bool_), start, False)
            index += 1


def source_digest(path: Path) -> str:
    """Return the SHA-256 of a slide's size and its first and last MiB; of a folder, of its files' names and sizes.

    It tells a replaced file without reading gigabytes. Raises SlideError `vanished`.
    """
    sha = hashlib.sha256()
    try:
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                sha.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            return sha.hexdigest()
        with path.open("rb") as stream:
            size = path.stat().st_size
            sha.update(f"{size}\n".encode() + stream.read(_DIGEST_BYTES))
            stream.seek(max(0, size - _DIGEST_BYTES))
            sha.update(stream.read(_DIGEST_BYTES))
    except OSError as error:
        raise SlideError(
            "vanished", f"{path.name}: {path} cannot be read ({error.strerror}). Is its disk there?"
        ) from error
    return sha.hexdigest()
