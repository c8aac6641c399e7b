"""Phantom regions on disk, and the tiles that are cut from them.

Invariant: a region's files are a pure function of its seed and size; held-out seeds (10000 and up) never train.
It does not know networks. A tile at factor k is 256×256 px of the k-times box-averaged region and starts on a
whole cell, so it covers exactly k×k cells with one SSL vector each.
"""

import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from engine.core.units import TILE_PX, MagnificationScale
from engine.slides.phantom.render import Phantom
from engine.training.checkpoints import save_array
from engine.training.settings import DataSettings

log = logging.getLogger(__name__)

HELDOUT_SEED = 10_000
_BLOCK_PX = 1024


@dataclass(frozen=True)
class Tile:
    """Where a tile lies: region number in its split, and its first cell (y, x)."""

    region: int
    cell_y: int
    cell_x: int


class Regions:
    """The rendered regions of one split: pixels per magnification (memory-mapped) and SSL grids."""

    def __init__(self, folders: list[Path], scale: MagnificationScale, cells: int) -> None:
        self.folders, self.scale, self.cells = folders, scale, cells
        self._pixels = [[np.load(folder / f"{name}.npy", mmap_mode="r") for name in scale.names] for folder in folders]
        self._ssl: list[np.ndarray] = []

    def load_ssl(self) -> None:
        """Read the SSL grids that encode_regions wrote."""
        self._ssl = [np.load(folder / "ssl.npy") for folder in self.folders]

    def pixels(self, region: int, level: int) -> np.ndarray:
        """Return a region at a magnification index: uint8 (h, w, 3), memory-mapped."""
        return self._pixels[region][level]

    def picture(self, tile: Tile, level: int) -> np.ndarray:
        """Return a tile's pixels: uint8 (256, 256, 3)."""
        step = TILE_PX // 2**level
        y, x = tile.cell_y * step, tile.cell_x * step
        return np.asarray(self.pixels(tile.region, level)[y : y + TILE_PX, x : x + TILE_PX])

    def ssl(self, tile: Tile, level: int) -> np.ndarray:
        """Return a tile's SSL grid: float32 (D, k, k)."""
        k, y, x = 2**level, tile.cell_y, tile.cell_x
        return self._ssl[tile.region][:, y : y + k, x : x + k]

    def tiles(self, level: int, count: int, seed: int) -> list[Tile]:
        """Draw `count` different tiles; the same seed draws the same tiles."""
        side = self.cells - 2**level + 1
        total = len(self.folders) * max(0, side) ** 2
        if count > total:
            raise ValueError(
                f"tiles at {self.scale.names[level]} must not exceed {total} ({len(self.folders)} regions of "
                f"{self.cells} cells); got {count}. Use fewer tiles, or more or larger regions."
            )
        rng = np.random.default_rng(np.random.SeedSequence((seed, level)))
        chosen = rng.choice(total, size=count, replace=False)
        return [Tile(int(n // side**2), int(n // side % side), int(n % side)) for n in chosen]


def region_seeds(data: DataSettings) -> tuple[list[int], list[int]]:
    """Return the phantom seeds of the training and of the held-out regions."""
    return list(range(data.train_regions)), list(range(HELDOUT_SEED, HELDOUT_SEED + data.heldout_regions))


def box_average(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Return uint8 (h, w, 3) reduced by an integer factor: the rounded mean of each square."""
    h, w, c = pixels.shape
    squares = pixels.reshape(h // factor, factor, w // factor, factor, c).astype(np.uint32)
    total = squares.sum(axis=(1, 3))
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)


def render_region(folder: Path, seed: int, cells: int, scale: MagnificationScale) -> None:
    """Render one region at the base magnification and write it at every magnification; skip what exists."""
    if all((folder / f"{name}.npy").exists() for name in scale.names):
        return
    phantom, side = Phantom.varied(seed), cells * TILE_PX
    base = np.empty((side, side, 3), np.uint8)
    for y in range(0, side, _BLOCK_PX):
        for x in range(0, side, _BLOCK_PX):
            h, w = min(_BLOCK_PX, side - y), min(_BLOCK_PX, side - x)
            base[y : y + h, x : x + w] = phantom.render(y * scale.base_mpp, x * scale.base_mpp, h, w, scale.base_mpp)
    for name in scale.names:
        rows = [box_average(base[y : y + TILE_PX], scale.factor(name)) for y in range(0, side, TILE_PX)]
        save_array(folder / f"{name}.npy", np.concatenate(rows))
    log.info("rendered region %d", seed)


def render_regions(run: Path, data: DataSettings, scale: MagnificationScale, processes: int) -> tuple[Regions, Regions]:
    """Render what is missing and return the training and the held-out regions."""
    splits = [[run / "data" / f"{seed:05d}" for seed in seeds] for seeds in region_seeds(data)]
    jobs = [(folder, int(folder.name), data.region_cells, scale) for folders in splits for folder in folders]
    if processes == 1:
        for job in jobs:
            render_region(*job)
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for done in [pool.submit(render_region, *job) for job in jobs]:
                done.result()
    train, heldout = (Regions(folders, scale, data.region_cells) for folders in splits)
    return train, heldout
