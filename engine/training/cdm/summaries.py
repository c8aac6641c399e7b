"""Stored summaries: windows of SSL grids at every magnification, through a model's Summarizer, once.

Invariant: which windows are taken is a function of the source, the counts and the seed; a file under its name is
complete. It does not know pixels or training. A window at factor k covers k×k base cells, like a patch of the model.
"""

import glob
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.conditions.reference import read_embeddings
from engine.core.errors import EngineError
from engine.core.units import MagnificationScale
from engine.datasets.dataset import PreparedSet
from engine.model.zoomldm import ZoomLDM
from engine.training.checkpoints import save_array
from engine.training.optimisation import step_rng

log = logging.getLogger(__name__)

WINDOWS = 20
"""Stage number of the windows' random stream."""
_BATCH = 64

Summaries = Sequence[NDArray[np.float16]]
"""Per magnification index, (N, T, C)."""


class Windows(Protocol):
    """Where windows come from, numbered from 0 at every magnification index."""

    @property
    def digest(self) -> str:
        """Sources of equal digests have the same windows under the same numbers."""
        ...

    def count(self, level: int) -> int: ...

    def window(self, level: int, number: int) -> NDArray[np.float32]:
        """Return the raw SSL vectors of one window: (D, k, k)."""
        ...


class GridFiles:
    """Every window of k×k cells in stored grids, one grid per region or slide."""

    def __init__(self, pattern: str, ssl_dim: int, scale: MagnificationScale) -> None:
        """Read the files that a glob names: (D, h, w) each.

        Raises: EngineError when there is none, one is damaged, or it comes from another encoder.
        """
        self.scale = scale
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise EngineError(
                f"{pattern} must name SSL grids, one file (D, h, w) per region or slide; nothing lies there. Encode "
                "regions first, or correct summaries.train and summaries.heldout."
            )
        try:
            self.grids = [read_embeddings(path) for path in paths]
        except ValueError as error:
            raise EngineError(str(error)) from error
        for path, grid in zip(paths, self.grids, strict=True):
            if grid.shape[0] != ssl_dim:
                raise EngineError(
                    f"the model's SSL vectors have {ssl_dim} channels; {path} has {grid.shape[0]}: it comes from "
                    "another encoder. Encode the region with the model's."
                )

    @property
    def digest(self) -> str:
        total = hashlib.sha256()
        for grid in self.grids:
            total.update(f"{grid.shape}".encode())
            total.update(np.ascontiguousarray(grid).data)
        return total.hexdigest()

    def _side(self, level: int) -> int:
        return self.scale.factor(self.scale.names[level])

    def count(self, level: int) -> int:
        return int(self._ends(level)[-1])

    def _ends(self, level: int) -> NDArray[np.int64]:
        """Return, per grid, how many windows lie in it and those before it."""
        k = self._side(level)
        return np.cumsum([max(0, g.shape[1] - k + 1) * max(0, g.shape[2] - k + 1) for g in self.grids])

    def window(self, level: int, number: int) -> NDArray[np.float32]:
        k, ends = self._side(level), self._ends(level)
        index = int(np.searchsorted(ends, number, side="right"))
        grid = self.grids[index]
        y, x = divmod(number - (int(ends[index - 1]) if index else 0), grid.shape[2] - k + 1)
        return grid[:, y : y + k, x : x + k]


class PreparedWindows:
    """The patches of a prepared set, as they were cut: each magnification has its own."""

    def __init__(self, folder: str, encoder: str, ssl_dim: int, scale: MagnificationScale) -> None:
        """Raises: PreparedError for a damaged set; PreparedMismatchError for one of another encoder or scale."""
        self.data = PreparedSet(folder)
        self.data.require(encoder=encoder, ssl_dim=ssl_dim, magnifications=scale.names, base_mpp=scale.base_mpp)

    @property
    def digest(self) -> str:
        return self.data.digest

    def count(self, level: int) -> int:
        return self.data.count(level)

    def window(self, level: int, number: int) -> NDArray[np.float32]:
        return self.data.example(level, number).grid


def open_windows(where: str, encoder: str, ssl_dim: int, scale: MagnificationScale) -> Windows:
    """Return the windows of a prepared set, if `where` is its folder, or of the grids that a glob names.

    Raises: EngineError, as the two kinds do.
    """
    if Path(where).is_dir():
        return PreparedWindows(where, encoder, ssl_dim, scale)
    return GridFiles(where, ssl_dim, scale)


def store_summaries(
    model: ZoomLDM, windows: Windows, counts: Sequence[float], seed: int, folder: Path
) -> list[NDArray[np.float16]]:
    """Write the summaries of random windows, one file per magnification, where they are missing.

    All windows are equally likely and none is taken twice; where there are fewer than `counts` asks for, all are taken.
    Returns them memory-mapped, base first: float16 (N, T, C).
    """
    found = []
    for level, name in enumerate(model.config.magnifications):
        path, total = folder / f"{name}.npy", windows.count(level)
        if not path.exists():
            chosen = step_rng(seed, WINDOWS, level).choice(total, min(int(counts[level]), total), replace=False)
            save_array(path, summaries_of(model, windows, level, chosen.tolist()))
            log.info("%s: %d summaries at %s", folder.name, len(chosen), name)
        found.append(np.load(path, mmap_mode="r"))
    return found


@torch.inference_mode()
def summaries_of(model: ZoomLDM, windows: Windows, level: int, numbers: Sequence[int]) -> NDArray[np.float16]:
    """Return the summaries of windows at one magnification index: float16 (N, T, C)."""
    parts = []
    for start in range(0, len(numbers), _BATCH):
        some = [torch.from_numpy(windows.window(level, n)) for n in numbers[start : start + _BATCH]]
        parts.append(model.summarize(some, [level] * len(some)).cpu().numpy().astype(np.float16))
    return np.concatenate(parts)
