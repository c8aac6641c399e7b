"""A multi-scale training set on disk: latents, SSL vectors and places of patches, slide by slide, memory-mapped.

Invariant: a slide counts once its slide.json is there, which is written last; what is opened was checked, file by
file, and what is returned is finite and of the stated shape. Each base cell has ONE stored vector, however many
patches cover it. It does not know slides' pixels or networks; the writer is prepared_writer.py.

    DATA/dataset.json                  what all slides share (SetFacts)
    DATA/slides/SLIDE/slide.json       SlideFacts
    DATA/slides/SLIDE/cells.npy        float16 (H, W, D): one SSL vector per base cell, NaN where no patch needs it
    DATA/slides/SLIDE/MAG/places.npy   int32 (N, 2): first cell (y, x) of each patch
                          tissue.npy   float32 (N,): share of tissue
                          latents.npy  float16 (N, 3, 64, 64): before the codebook, times the model's scale factor
                          images.npy   uint8 (N, 256, 256, 3), only if they were kept
                          grids.npy    float16 (N, D, g, g): in an imported set, instead of cells.npy
"""

import bisect
import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import PreparedError
from engine.core.units import TILE_PX
from engine.datasets.schema import (
    SLIDE,
    SLIDES,
    SetFacts,
    SlideFacts,
    check_files,
    check_set_facts,
    read_set_facts,
    read_slide_facts,
)

__all__ = ["Example", "PreparedSet", "SetFacts", "SlideFacts"]

_OPEN_FILES = 512
"""Arrays a set keeps mapped; a process may have 1024 files open."""


class Example(NamedTuple):
    """One patch to train on."""

    latent: NDArray[np.float32]
    """(3, 64, 64)."""
    grid: NDArray[np.float32]
    """(D, k, k), raw; k is 2**level, or what was asked for with `side`, or the side that an imported set holds."""
    slide: str


class PreparedSet:
    """The patches of a folder, or of some of its slides. Cheap to pickle: processes open it again.

    >>> import engine, numpy as np, PIL.Image
    >>> from pathlib import Path
    >>> Path("slides").mkdir(exist_ok=True)
    >>> tissue = np.random.default_rng(0).integers((150, 50, 130), (220, 130, 200), (512, 512, 3)).astype(np.uint8)
    >>> PIL.Image.fromarray(tissue).save("slides/case_7.png")
    >>> place = {"out": "runs/set", "backend": "local", "progress": False}
    >>> _ = engine.prepare_dataset("slides", **place, mpp=0.5, coarsest="1.25x")
    >>> latent, grid, slide = engine.TrainingSet("runs/set").example(1, 0)
    >>> latent.shape, grid.shape, slide
    ((3, 64, 64), (64, 2, 2), 'case_7')
    """

    def __init__(self, folder: str | Path, slides: Collection[str] | None = None) -> None:
        """Check all files' headers and sizes; no pixels are read. `slides` are names; None takes all that are whole.

        Raises: PreparedError naming the file that is missing, damaged or of another shape.
        """
        self.folder = Path(folder)
        self.facts = read_set_facts(self.folder)
        self.magnifications = self.facts.magnifications
        whole = sorted(path.parent.name for path in (self.folder / SLIDES).glob(f"*/{SLIDE}"))
        self.slides = tuple(whole if slides is None else sorted(slides))
        lost = sorted(set(self.slides) - set(whole))
        if lost or not self.slides:
            named = f"{self.folder / SLIDES} must hold " + (f"{', '.join(lost)}, whole" if lost else "a whole slide")
            raise PreparedError(f"{named}; it does not. Run engine.prepare again: it makes what is missing.")
        self._facts = [read_slide_facts(self.folder, name) for name in self.slides]
        for facts in self._facts:
            check_files(self.folder / SLIDES / facts.slide, facts, self.facts)
        self._ends = [list(accumulate(f.counts.get(name, 0) for f in self._facts)) for name in self.magnifications]
        self._map = lru_cache(_OPEN_FILES)(_mapped)

    def __reduce__(self) -> tuple[type["PreparedSet"], tuple[Path, tuple[str, ...]]]:
        return type(self), (self.folder, self.slides)

    @property
    def digest(self) -> str:
        """SHA-256 of what the set is and holds: an index means the same patch in sets of equal digests."""
        held = [(f.slide, f.source_digest, dict(f.counts)) for f in self._facts]
        return hashlib.sha256(json.dumps([asdict(self.facts), held], sort_keys=True).encode()).hexdigest()

    @property
    def has_images(self) -> bool:
        """Whether all patches have their pixels."""
        return all(facts.images for facts in self._facts)

    def slide_facts(self, slide: str) -> SlideFacts:
        """Return what is known of a slide. Raises ValueError for one that is not in the set."""
        return self._facts[self.slides.index(slide)]

    def count(self, level: int) -> int:
        """Return how many patches a level has; 0 is possible."""
        return self._ends[level][-1]

    def require(self, **expected: Any) -> None:
        """Hold the set to fields of SetFacts. Raises PreparedMismatchError naming each that differs."""
        check_set_facts(self.folder, self.facts, expected)

    def require_patches(self, level: int) -> None:
        """Raise PreparedError if a level has no patches."""
        if not self.count(level):
            side = TILE_PX * 2**level
            raise PreparedError(
                f"{self.folder} must have patches at {self.magnifications[level]} to train on; it has none in its "
                f"{len(self.slides)} slides. Prepare slides of at least {side} px on a side at the base, lower "
                "--min_tissue, or give this magnification the weight 0."
            )

    def example(self, level: int, index: int, side: int | None = None) -> Example:
        """Return one patch; `side` averages its grid to at most that many cells on each axis (a power of two).

        Raises: IndexError; PreparedError if it is not finite.
        """
        folder, facts, row = self._find(level, index)
        name = self.magnifications[level]
        latent = np.asarray(self._map(folder / name / "latents.npy")[row], np.float32)
        cells, k = self._cells(folder, facts, name, row)
        if side is not None and k > side:
            cells = cells.reshape(side, k // side, side, k // side, -1).mean((1, 3), dtype=np.float32)
        grid = np.ascontiguousarray(cells.transpose(2, 0, 1), np.float32)
        for what, array in (("latent", latent), ("SSL grid", grid)):
            if not np.isfinite(array).all():
                raise PreparedError(
                    f"every {what} must be finite; that of patch {row} in {folder / name} is not. Its files are "
                    f"damaged: remove {folder} and run engine.prepare again."
                )
        return Example(latent, grid, facts.slide)

    def image(self, level: int, index: int) -> NDArray[np.uint8]:
        """Return the pixels of a patch: (256, 256, 3). Raises PreparedError if they were not kept."""
        folder, facts, row = self._find(level, index)
        if not facts.images:
            raise PreparedError(f"{folder} must hold images; it was prepared without --keep_images. Prepare it again.")
        return np.array(self._map(folder / self.magnifications[level] / "images.npy")[row])

    def place(self, level: int, index: int) -> tuple[str, int, int]:
        """Return a patch's slide and first cell (y, x); in an imported set its number and 0."""
        folder, facts, row = self._find(level, index)
        y, x = self._map(folder / self.magnifications[level] / "places.npy")[row]
        return facts.slide, int(y), int(x)

    def tissue(self, level: int, index: int) -> float:
        """Return the share of a patch that is tissue."""
        folder, _, row = self._find(level, index)
        return float(self._map(folder / self.magnifications[level] / "tissue.npy")[row])

    def _find(self, level: int, index: int) -> tuple[Path, SlideFacts, int]:
        ends = self._ends[level]
        if not 0 <= index < ends[-1]:
            raise IndexError(f"a patch at {self.magnifications[level]} must be 0…{ends[-1] - 1}; got {index}.")
        at = bisect.bisect_right(ends, index)
        facts = self._facts[at]
        return self.folder / SLIDES / facts.slide, facts, index - (ends[at - 1] if at else 0)

    def _cells(self, folder: Path, facts: SlideFacts, name: str, row: int) -> tuple[NDArray[np.float16], int]:
        """Return the vectors beneath a patch (k, k, D), and k."""
        if name in facts.grid_sides:
            grid = self._map(folder / name / "grids.npy")[row]
            return grid.transpose(1, 2, 0), grid.shape[-1]
        k = self.facts.scale.factor(name)
        y, x = self._map(folder / name / "places.npy")[row]
        cells = self._map(folder / "cells.npy")[max(y, 0) : y + k, max(x, 0) : x + k]
        if cells.shape[:2] != (k, k):
            raise PreparedError(f"{folder / name}/places.npy must lie on the slide; patch {row} does not: ({y}, {x}).")
        return cells, k


def _mapped(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise PreparedError(f"{path} must stay readable while it is used; {error}.") from error
