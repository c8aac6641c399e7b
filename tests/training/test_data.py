"""Tiles lie on whole cells and match the base pixels; held-out seeds never train; settings refuse nonsense."""

from pathlib import Path

import numpy as np
import pytest

from engine.core.cli import parse
from engine.core.units import MagnificationScale
from engine.training.demo.data import HELDOUT_SEED, Regions, Tile, region_seeds, render_region
from engine.training.pictures import as_images, as_pictures
from engine.training.settings import DataSettings, DemoConfig


def test_a_tile_is_the_box_average_of_its_cells(regions: Regions) -> None:
    tile, level = Tile(1, 3, 2), 2
    base = np.asarray(regions.pixels(1, 0))[3 * 256 : 7 * 256, 2 * 256 : 6 * 256].astype(float)
    mean = base.reshape(256, 4, 256, 4, 3).mean(axis=(1, 3))
    assert np.abs(regions.picture(tile, level) - mean).max() <= 0.5
    assert regions.ssl(tile, level).shape == (16, 4, 4)


def test_tiles_are_different_inside_and_repeatable(regions: Regions) -> None:
    tiles = regions.tiles(1, 60, seed=4)
    assert len(set(tiles)) == 60
    assert tiles == regions.tiles(1, 60, seed=4)
    assert tiles != regions.tiles(1, 60, seed=5)
    assert max(max(t.cell_y, t.cell_x) for t in tiles) <= regions.cells - 2
    with pytest.raises(ValueError, match="must not exceed 2"):
        regions.tiles(3, 3, seed=0)


def test_heldout_seeds_never_train() -> None:
    train, heldout = region_seeds(DataSettings(train_regions=50, heldout_regions=3))
    assert not set(train) & set(heldout)
    assert min(heldout) == HELDOUT_SEED


def test_a_region_is_rendered_once_and_is_the_same_again(tmp_path: Path) -> None:
    scale = MagnificationScale(("20x", "10x"), 0.5)
    for name in ("a", "b"):
        render_region(tmp_path / name, 5, 2, scale)
    first, second = (np.load(tmp_path / name / "10x.npy") for name in ("a", "b"))
    assert first.shape == (256, 256, 3)
    assert np.array_equal(first, second)
    written = (tmp_path / "a" / "20x.npy").stat().st_mtime_ns
    render_region(tmp_path / "a", 5, 2, scale)
    assert (tmp_path / "a" / "20x.npy").stat().st_mtime_ns == written


def test_pixels_survive_the_way_through_floats() -> None:
    pictures = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(as_pictures(as_images(list(pictures))), pictures)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.train_tiles': 2"):
        DemoConfig(data=DataSettings(train_tiles=(1, 1)))


def test_the_demo_configuration_is_read_and_unknown_keys_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(["--config", "configs/train_demo.yaml", "--autoencoder.plain.steps", "100"], DemoConfig, "train", "")
    assert config.autoencoder.plain.steps == 100
    assert config.out == "runs/train_demo/model"
    with pytest.raises(SystemExit):
        parse(["--config", "configs/train_demo.yaml", "--autoencoder.plain.stepps", "100"], DemoConfig, "train", "")
    assert "stepps" in capsys.readouterr().err
