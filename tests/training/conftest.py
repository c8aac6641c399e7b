"""One tiny region of random tissue-like pixels, shared by the trainer's tests."""

from pathlib import Path

import numpy as np
import pytest

from engine.core.units import MagnificationScale
from engine.training.demo.data import Regions, box_average

SCALE = MagnificationScale(("20x", "10x", "5x", "2.5x"), 0.5)
CELLS, SSL_DIM = 8, 16


@pytest.fixture(scope="session")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Regions:
    """Two regions of 8×8 cells with four magnifications and random SSL grids."""
    root: Path = tmp_path_factory.mktemp("regions")
    rng = np.random.default_rng(0)
    folders = [root / "00000", root / "00001"]
    for folder in folders:
        folder.mkdir()
        coarse = rng.integers(0, 256, (CELLS * 32, CELLS * 32, 3), dtype=np.uint8)
        base = coarse.repeat(8, axis=0).repeat(8, axis=1)
        for name in SCALE.names:
            np.save(folder / f"{name}.npy", box_average(base, SCALE.factor(name)))
        np.save(folder / "ssl.npy", rng.standard_normal((SSL_DIM, CELLS, CELLS), dtype=np.float32))
    found = Regions(folders, SCALE, CELLS)
    found.load_ssl()
    return found
