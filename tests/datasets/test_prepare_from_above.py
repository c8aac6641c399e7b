"""Pictures from above become a training set at all four magnifications, on the scale that their GeoTIFF says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.core.progress import Progress
from engine.core.units import NAIP_SCALE
from engine.datasets.config import PrepareBlocks, PrepareConfig
from engine.datasets.dataset import PreparedSet
from engine.datasets.prepare import prepare
from engine.model.encoders.demo import DemoEncoder
from engine.model.encoders.texture import RAW_DIM
from engine.model.zoomldm import ZoomLDM
from engine.pipeline.stages import local_backend
from tests.support.tiny_run import narrow_config
from tests.support.written_slides import METRES, write_geotiff

SIDE_M = 2048
"""Metres on the ground along each side: one patch at 4x, which is 8 m/px."""


def store_model(folder: Path) -> Path:
    """Store a tiny model of the published pictures from above, with an SSL encoder of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names, mpp = NAIP_SCALE.names, NAIP_SCALE.base_mpp
        made = ZoomLDM(narrow_config(magnifications=names, base_mpp=mpp, encoder="demo"))
        encoder = DemoEncoder(torch.zeros(RAW_DIM), torch.randn(RAW_DIM, 16) / 10)
    made.extras = {"encoder/model": encoder.tensors()}
    made.save_pretrained(folder)
    return folder


def ground(down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """What the ground shows at places in metres: red grows to the east, green to the south."""
    shown = np.empty((len(down), len(across), 3))
    shown[..., 0], shown[..., 1], shown[..., 2] = across * 255 / SIDE_M, down[:, None] * 255 / SIDE_M, 128
    return shown


def centres(count: int, step: float, first: float = 0.0) -> np.ndarray:
    return first + (np.arange(count) + 0.5) * step


def test_a_geotiff_is_prepared_from_1x_to_4x(tmp_path: Path) -> None:
    """Each px of every patch shows what lies on the ground there; the file's px are 0.8 m wide and 1 m high."""
    (tmp_path / "pictures").mkdir()
    picture = np.rint(ground(centres(2048, 1.0), centres(2560, 0.8))).astype(np.uint8)
    write_geotiff(tmp_path / "pictures" / "a.tif", METRES, (0.8, 1.0, 0.0), picture)
    config = PrepareConfig(
        str(tmp_path / "pictures"), str(tmp_path / "out"), domain="naip", keep_images=True, blocks=PrepareBlocks(64, 4)
    )
    source = str(store_model(tmp_path / "model"))
    config = replace(config, model=replace(config.model, source=source, device="cpu", dtype="float32"))
    (record,) = prepare(config, local_backend, Progress(), False)
    assert (record.code, record.counts) == ("", {"1x": 64, "2x": 16, "3x": 4, "4x": 1})
    found = PreparedSet(config.out)
    assert found.slide_facts("a").mpp_source == "GeoTIFF pixel scale"
    assert found.slide_facts("a").mpp == pytest.approx((0.8e6, 1e6))
    for level, factor in enumerate((1, 2, 4, 8)):
        for i in range(found.count(level)):
            _, y, x = found.place(level, i)
            shown = ground(centres(256, factor, y * 256), centres(256, factor, x * 256))
            assert np.abs(found.image(level, i) - shown).max() < 1.6, (level, i)
            assert found.example(level, i).grid.shape == (16, factor, factor)
