"""Captioned phantoms: SSL grids of regions and a table of sentences, what the demo's text prior learns from.

Invariant: region n is a pure function of (seed of the phantom, number of cells, encoder); a region that is there is not
made again. It does not know networks beside the encoder that it is given.
"""

import csv
import io
import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from engine.conditions.reference import embedding_grid
from engine.core.units import TILE_PX
from engine.model.encoders.base import SSLEncoder
from engine.model.encoders.registry import load_encoder
from engine.model.zoomldm import ZoomLDM
from engine.slides.phantom.captions import PhantomShares, caption
from engine.slides.phantom.render import Phantom
from engine.training.checkpoints import save_array, write_atomically
from engine.training.demo.data import HELDOUT_SEED
from engine.training.text.captions import COLUMNS

log = logging.getLogger(__name__)

MPP_UM = 0.5
CAPTIONS = "captions.csv"
_STREAM = 93
_CANDIDATES = 24
"""Windows among which the one with most of a kind is taken."""
_FILLING = 3
"""The first kinds, which fill windows: nests, stroma, fat."""


@dataclass(frozen=True)
class CaptionedConfig:
    """How many phantom regions are rendered, and how they are described.

    The regions of `heldout` have seeds from 10000 on, which nothing in this project trains on.
    """

    out: str = "runs/train_demo_text/data"
    """Folder for train/ and heldout/: grids (.npy), shares and captions.csv each. What is there is kept."""
    source: str = "demo"
    """Model whose SSL encoder describes the cells."""
    regions: int = 200
    """Regions to learn from."""
    heldout: int = 24
    """Regions that are only measured on."""
    cells: int = 10
    """Cells of 256 px of a region on each axis."""
    captions: int = 80
    """Sentences per region, each of a window of its own."""
    smallest: int = 1
    """Cells of a described window on each axis at least."""
    largest: int = 8
    """And at most."""
    processes: int = 2
    """Processes that render and encode."""

    def __post_init__(self) -> None:
        for name in ("regions", "heldout", "captions", "processes", "smallest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not self.smallest <= self.largest <= self.cells:
            raise ValueError(
                "windows must satisfy smallest <= largest <= cells; got "
                f"{self.smallest}, {self.largest} and {self.cells}."
            )


def write_captioned(config: CaptionedConfig) -> list[Path]:
    """Render, encode and describe what is missing; return the two folders. Raises: EngineError."""
    folders = [Path(config.out) / "train", Path(config.out) / "heldout"]
    jobs = [(config, folders[0], seed) for seed in range(config.regions)]
    jobs += [(config, folders[1], HELDOUT_SEED + n) for n in range(config.heldout)]
    with ProcessPoolExecutor(config.processes, mp_context=get_context("spawn")) as pool:
        for number, done in enumerate([pool.submit(_write_region, *job) for job in jobs], 1):
            done.result()
            if number % 10 == 0:
                log.info("%d of %d regions", number, len(jobs))
    for folder in folders:
        _describe(folder, config)
    return folders


def _write_region(config: CaptionedConfig, folder: Path, seed: int) -> None:
    grid, shares = folder / f"{seed:05d}.npy", folder / "shares" / f"{seed:05d}.npy"
    if grid.exists() and shares.exists():
        return
    phantom, side = Phantom.varied(seed), config.cells * TILE_PX
    save_array(shares, PhantomShares.of(phantom, config.cells, config.cells).cells)
    save_array(grid, embedding_grid(phantom.render(0, 0, side, side, MPP_UM), _encoder(config.source)))


@cache
def _encoder(source: str) -> SSLEncoder:
    torch.set_num_threads(1)
    model = ZoomLDM.from_pretrained(source)
    return load_encoder(model.config.encoder, None, model.extras, "cpu")


def _describe(folder: Path, config: CaptionedConfig) -> None:
    """Write the table of captions of a folder's regions; x, y, width and height in px of the grid's magnification."""
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(COLUMNS)
    for path in sorted(folder.glob("*.npy")):
        seed = int(path.stem)
        phantom = Phantom.varied(seed)
        shares = PhantomShares(phantom, np.load(folder / "shares" / path.name))
        rng = np.random.default_rng(np.random.SeedSequence((_STREAM, seed)))
        for number in range(config.captions):
            y, x, height, width = _window(shares, config, rng, number)
            text = caption(shares.window(y, x, height, width), rng, phantom)
            rows.writerow((path.stem, *(n * TILE_PX for n in (x, y, width, height)), text))
    write_atomically(folder / CAPTIONS, lambda partial: partial.write_text(table.getvalue(), encoding="utf-8"))


def _window(
    shares: PhantomShares, config: CaptionedConfig, rng: np.random.Generator, number: int
) -> tuple[int, int, int, int]:
    """Return y, x, height and width of the window of caption `number`, in cells.

    Every second one is a window at random; the others have much of one kind, each in its turn. At random "only stroma"
    is rare, and a prior that hardly met it took "only" for fat.
    """
    drawn = []
    for _ in range(1 if number % 2 == 0 else _CANDIDATES):
        height, width = (int(n) for n in rng.integers(config.smallest, config.largest + 1, 2))
        y, x = (int(rng.integers(config.cells - side + 1)) for side in (height, width))
        drawn.append((y, x, height, width))
    kind = number // 2 % _FILLING
    return max(drawn, key=lambda window: float(shares.window(*window)[kind]))
