"""The choice of features runs at tiny size, and its classifier finds what is there and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.features import feature_choice
from benchmarks.features.feature_choice import BEGIN, END, TASKS, area, draw_slides, main, measure, probe, tables
from engine.model.unet_features import block_widths
from engine.model.zoomldm import ZoomLDM
from tests.support.tiny_run import narrow_config


def test_area_is_the_share_of_pairs_in_order() -> None:
    high = np.array([True, True, False, False])
    assert area(np.array([3.0, 2.0, 1.0, 0.0]), high) == 1
    assert area(np.array([0.0, 1.0, 2.0, 3.0]), high) == 0
    assert area(np.array([2.0, 1.0, 1.0, 0.0]), high) == 0.875


@pytest.mark.parametrize("width", [8, 300])
def test_the_probe_finds_a_direction_and_not_noise_nor_the_slide(width: int) -> None:
    rng = np.random.default_rng(0)
    slide = np.repeat(np.arange(24), 10)
    high = slide % 2 == 1
    # Each slide has an offset of its own, as stains have: a classifier that learns slides by heart gains nothing.
    noise = rng.normal(size=(240, width)) + 2 * rng.normal(size=(24, width))[slide]
    assert abs(probe(noise, high, slide)[0] - 0.5) < 0.2
    signal = noise.copy()
    signal[:, : width // 4] += 3 * high[:, None]
    auc, deviation = probe(signal, high, slide)
    assert auc > 0.95
    assert 0 <= deviation < 0.05


def test_tiles_are_renderings_at_their_magnification() -> None:
    drawn = draw_slides(TASKS[1], 2, 1, None, 0.5)
    again = draw_slides(TASKS[1], 2, 1, None, 0.5)
    assert drawn.high.tolist() == [False, True]
    assert drawn.tiles[1].images.shape == (1, 3, 256, 256)
    assert drawn.colours.shape == (2, 6)
    np.testing.assert_array_equal(drawn.tiles[1].images, again.tiles[1].images)


def test_it_runs_and_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ZoomLDM(narrow_config())
    found = measure(model, None, slides=8, tiles=1, timesteps=[100])
    blocks = block_widths(model.config)
    assert list(found) == ["20x pleomorphism", "5x architecture"]
    names = ["colour", *(f"null 100 {name}" for name in blocks), "null 100 up.0+up.1", "null 100 mid+up.0+up.1"]
    for rows in found.values():
        assert list(rows) == names
        assert all(0 <= auc <= 1 for auc, _ in rows.values())
    costs = dict.fromkeys(["autoencoder", *blocks], 1.0)
    assert "**Best of both tasks**" in tables(found, costs)

    monkeypatch.setattr(feature_choice, "measure", lambda *_: found)
    monkeypatch.setattr(feature_choice, "cost", lambda _: costs)
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--slides", "8", "--write", str(page), "--json", str(figures)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n`python -m benchmarks.features.feature_choice --slides 8")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert json.loads(figures.read_text())["ms_per_tile"] == costs


def test_folds_need_slides_of_both_classes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--slides", "7"])
    assert "--slides must be even and at least 8" in capsys.readouterr().err
