"""Super-resolution at every enlargement that is promised, and of a picture larger than one guide tile.

tests/test_superres.py has what a run leaves, at 4x.
"""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from engine import superres
from engine.conditions.conditions import STORED
from engine.images.ome_zarr import Image
from tests.support.tiny_run import store_model


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run with a random tiny model that knows a magnification 16 times coarser than its base."""
    model = store_model(tmp_path_factory.mktemp("model"), magnifications=("20x", "10x", "5x", "2.5x", "1.25x"))
    keys = {
        "model.source": model,
        "inversion.steps": 2,
        "sampling.stride": 100,
        "sampling.weight": 0,
        "output.formats": "[]",
        "ray.enabled": "false",
    }
    return [f"--{k}={v}" for k, v in keys.items()]


def write_picture(path: Path, height: int, width: int) -> np.ndarray:
    """Every px is another colour, so that a guide shifted by one px agrees nowhere."""
    low = np.random.default_rng(0).integers(40, 216, (height, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(low).save(path)
    return low


def agreement_db(found: np.ndarray, low: np.ndarray, factor: int) -> float:
    """PSNR of the result (3, h, w), averaged down without the engine's help, against the picture (h, w, 3)."""
    small = found.reshape(3, low.shape[0], factor, low.shape[1], factor).mean(axis=(2, 4)).transpose(1, 2, 0)
    return float(10 * np.log10(255**2 / np.square(small - low).mean()))


@pytest.mark.parametrize(
    ("factor", "size", "cells", "levels"),
    [
        (2, (128, 170), (1, 2), ["10x", "20x"]),
        (8, (32, 45), (1, 2), ["2.5x", "20x"]),
        (16, (16, 24), (1, 2), ["1.25x", "20x"]),
    ],
)
def test_reduced_by_its_factor_the_result_is_the_picture(
    factor: int, size: tuple[int, int], cells: tuple[int, int], levels: list[str], flags: list[str], tmp_path: Path
) -> None:
    """The smallest height that is allowed; a width that is not whole cells."""
    low = write_picture(tmp_path / "low.png", *size)
    run = tmp_path / "run"
    assert superres.main([str(tmp_path / "low.png"), *flags, f"--scale={factor}", f"--output.folder={run}"]) == 0
    image = Image.open(run / "image.ome.zarr")
    found = image.read(0, factor * size[0])
    assert found.shape == (3, factor * size[0], factor * size[1])
    assert agreement_db(found, low, factor) >= 30
    assert json.loads((run / "report.json").read_text())["consistency_psnr_db"] >= 30
    assert list(image.provenance["config"]["canvas.levels"]) == levels
    assert np.load(run / STORED).shape == (16, *cells)


def test_a_picture_larger_than_a_guide_tile_and_not_square(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two windows on each axis, which share a row and a column of vectors; sides that no cell and no tile divides."""
    low, run = write_picture(tmp_path / "low.png", 258, 300), tmp_path / "run"
    argv = [*flags, "--scale=2", "--sampling.stride=200", f"--output.folder={run}"]
    assert superres.main([str(tmp_path / "low.png"), *argv]) == 0
    assert "condition inversion: 4 window(s)" in capsys.readouterr().err
    grid = np.load(run / STORED)
    start = np.random.default_rng(np.random.SeedSequence(0)).standard_normal((16, 3, 3), dtype=np.float32)
    moved = np.abs(grid - start).max(axis=0)
    assert moved.min() > 0.05, "a vector that no window taught stays where it began; Adam's first step is 0.1"
    image = Image.open(run / "image.ome.zarr")
    found = image.read(0, 516)
    assert found.shape == (3, 516, 600)
    assert agreement_db(found, low, 2) >= 30
    guide = np.asarray(PIL.Image.open(run / "guide.png"))
    assert np.array_equal(guide[:258, :300], low)
