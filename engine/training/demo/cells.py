"""SSL vectors of a run: the encoder is fitted on cells of the training regions, then every cell is encoded once.

It does not know magnifications beyond the base, nor networks that are trained by gradient.
"""

import logging
from pathlib import Path

import numpy as np
import torch

from engine.core.units import TILE_PX
from engine.model.encoders.demo import DemoEncoder
from engine.training.checkpoints import load_checkpoint, save_array, save_checkpoint
from engine.training.demo.data import Regions

log = logging.getLogger(__name__)


def fit_encoder(train: Regions, cells: int, seed: int, path: Path) -> DemoEncoder:
    """Fit the encoder on `cells` random cells of the training regions, or read the one that was fitted."""
    if not path.exists():
        pictures = [train.picture(tile, 0) for tile in train.tiles(0, cells, seed + 2)]
        encoder = DemoEncoder.fit(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
        # The model folder stores float16: rounding now makes the vectors users get those that were trained on.
        save_checkpoint(path, {name: value.half().float() for name, value in encoder.tensors().items()})
    return DemoEncoder.from_tensors(load_checkpoint(path))


def encode_regions(encoder: DemoEncoder, regions: Regions) -> None:
    """Write float32 (D, h, w) beside each region's pixels, where it is missing, and let the regions read it."""
    for number, folder in enumerate(regions.folders):
        path = folder / "ssl.npy"
        if not path.exists():
            save_array(path, _encode_region(encoder, regions.pixels(number, 0)))
            log.info("encoded the cells of region %s", folder.name)
    regions.load_ssl()


def _encode_region(encoder: DemoEncoder, pixels: np.ndarray) -> np.ndarray:
    rows = []
    for y in range(0, pixels.shape[0], TILE_PX):
        row = np.asarray(pixels[y : y + TILE_PX]).reshape(TILE_PX, -1, TILE_PX, 3).transpose(1, 3, 0, 2)
        rows.append(encoder.encode(torch.from_numpy(np.ascontiguousarray(row))).numpy())
    return np.ascontiguousarray(np.stack(rows).transpose(2, 0, 1))
