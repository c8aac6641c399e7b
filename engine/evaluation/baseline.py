"""Single patches of the model and conditions that made a canvas: what its detail is judged by.

Invariant: patch n is a pure function of the run's weights, conditions, weight and number of steps, and of the seed. A
patch has no neighbours and no guide, so what the canvas lacks beside it was lost by joining tiles or by steering.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.conditions.patch_sampler import PatchSampler
from engine.core.errors import EngineError
from engine.core.runtime import choose_device
from engine.core.units import TILE_PX
from engine.generation.finished_run import FinishedRun
from engine.generation.run import load_model, stored_config
from engine.images.detail import Detail, DetailSums
from engine.sampling.pixels import to_uint8
from engine.sampling.schedule import TRAIN_STEPS


@dataclass(frozen=True)
class Baseline:
    """Patches, and the same cells of the canvases."""

    patches: NDArray[np.uint8]
    """(n, 3, 256, 256)."""
    canvas: NDArray[np.uint8]
    """(n, 3, 256, 256), the canvas where each patch's condition lies."""
    mpp: float
    said: str
    """How the patches were drawn."""

    def details(self, tissue_grey: float) -> tuple[Detail, Detail]:
        """Return the detail of the canvas' cells and of the patches."""
        sums = DetailSums(tissue_grey), DetailSums(tissue_grey)
        for one, pictures in zip(sums, (self.canvas, self.patches), strict=True):
            for picture in pictures:
                one.add(picture)
        return sums[0].result(), sums[1].result()


def draw_baseline(runs: list[Path], count: int, seed: int, device: str) -> Baseline:
    """Draw `count` patches, spread evenly over the cells of all runs, which must be of one µm/px.

    Raises: EngineError if the runs hold no whole cell; CheckpointError if the model cannot be had.
    """
    share = -(-count // len(runs))
    parts = [part for folder in runs for part in _of_run(FinishedRun(folder), share, seed, device)]
    if not parts:
        raise EngineError("single patches need whole cells of 256x256 px; no run has one. Make larger canvases.")
    found = {part.mpp for part in parts}
    if len(found) > 1:
        raise EngineError(f"single patches need runs of one µm/px; got {sorted(found)}. Compare them one by one.")
    patches = np.concatenate([part.patches for part in parts])[:count]
    canvas = np.concatenate([part.canvas for part in parts])[:count]
    # Runs of different settings are said once each.
    return Baseline(patches, canvas, parts[0].mpp, "; ".join(dict.fromkeys(part.said for part in parts)))


def _of_run(finished: FinishedRun, count: int, seed: int, device: str) -> Iterator[Baseline]:
    """Yield the patches of one run, batch by batch."""
    config, image, grid = stored_config(finished.root.folder), finished.picture(), finished.grid
    rows, columns = image.height // TILE_PX, image.width // TILE_PX
    total = min(count, rows * columns)
    model = load_model(config).to(choose_device(device if device != "auto" else config.model.device))
    sampling = config.sampling
    steps = len(range(TRAIN_STEPS, 0, -sampling.stride))  # a patch has no picture to begin from
    sampler = PatchSampler("ddim", steps, 1 + sampling.weight, seed)
    index = model.config.scale.index(model.config.scale.base)
    said = f"ddim, {steps} steps, w = {sampling.weight:g}, seed {seed}, {model.config.scale.base}, {config.model.dtype}"
    places = [divmod(i * rows * columns // total, columns) for i in range(total)]
    for first in range(0, total, sampling.batch_size):
        some = places[first : first + sampling.batch_size]
        cells = [np.ascontiguousarray(grid[:, y : y + 1, x : x + 1]) for y, x in some]
        # Filled up, so that every call has one shape: kernels differ by shape.
        filled = cells + cells[:1] * (sampling.batch_size - len(cells))
        drawn = to_uint8(sampler.draw(model, filled, index, first))[: len(some)]
        canvas = [image.read(y * TILE_PX, (y + 1) * TILE_PX, x * TILE_PX, (x + 1) * TILE_PX) for y, x in some]
        yield Baseline(drawn, np.stack(canvas), image.mpp_um, said)


def condition_cells(finished: FinishedRun, most: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return up to `most` conditions of a run (n, D) and the canvas under each, uint8 (n, 3, 256, 256)."""
    image, grid = finished.picture(), finished.grid
    rows, columns = image.height // TILE_PX, image.width // TILE_PX
    total = min(most, rows * columns)
    places = [divmod(i * rows * columns // total, columns) for i in range(total)]
    vectors = np.stack([grid[:, y, x] for y, x in places]) if places else np.zeros((0, len(grid)), np.float32)
    cells = [image.read(y * TILE_PX, (y + 1) * TILE_PX, x * TILE_PX, (x + 1) * TILE_PX) for y, x in places]
    return vectors, np.stack(cells) if cells else np.zeros((0, 3, TILE_PX, TILE_PX), np.uint8)
