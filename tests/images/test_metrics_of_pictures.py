"""Scores judge what they say they judge; the report is whole JSON."""

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import CanvasError
from engine.images.metrics import GOOD_SEAM_SCORE, InMemory, consistency_psnr, seam_score, seam_scores, write_report
from engine.images.ome_zarr import Image


def smooth_noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise blurred over 8 px: gradients of one size everywhere."""
    noise = np.random.default_rng(seed).standard_normal((3, height + 8, width + 8))
    total = np.cumsum(np.cumsum(noise, axis=1), axis=2)
    blurred = total[:, 8:, 8:] - total[:, :-8, 8:] - total[:, 8:, :-8] + total[:, :-8, :-8]
    return np.clip(128 + 5 * blurred, 0, 255).astype(np.uint8)


EDGES = list(range(0, 1200, 100))


def test_seams_of_one_direction_are_not_averaged_away():
    pixels = smooth_noise(1200, 1200).astype(int) + 12 * (np.arange(1200) // 100 % 2)
    picture = InMemory(np.clip(pixels, 0, 255).astype(np.uint8))
    assert seam_score(picture, EDGES, EDGES) == seam_score(picture, [], EDGES)


def test_noise_without_tiles_scores_one():
    score = seam_score(InMemory(smooth_noise(1200, 1100)), EDGES, EDGES[:12])
    assert score == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("axis", [0, 1])
def test_planted_seam_is_seen(axis: int):
    pixels = smooth_noise(1200, 1200).astype(int)
    steps = 12 * (np.arange(1200) // 100 % 2)
    pixels += steps[:, None] if axis == 0 else steps
    score = seam_score(InMemory(np.clip(pixels, 0, 255).astype(np.uint8)), EDGES, EDGES)
    assert score is not None
    assert score > GOOD_SEAM_SCORE


def test_the_control_is_what_lines_without_a_seam_score():
    pixels = smooth_noise(1200, 1200).astype(int)
    few = [0, 400, 800, 1200]
    plain, control = seam_scores(InMemory(pixels.astype(np.uint8)), few, few)
    pixels += 12 * (np.arange(1200) // 400 % 2)
    seam, beside = seam_scores(InMemory(np.clip(pixels, 0, 255).astype(np.uint8)), few, few)
    assert plain is not None
    assert control is not None
    assert seam is not None
    assert beside is not None
    assert plain <= control + 0.02
    assert seam > beside + 0.1
    assert beside == pytest.approx(control, abs=0.02)  # a seam does not raise its own control
    assert seam_scores(InMemory(smooth_noise(64, 64)), [32, 40], [])[1] is None  # no room beside these borders


def test_stripes_along_one_axis_are_no_seam():
    stripes = smooth_noise(1200, 1200)
    stripes[:, :, ::2] //= 2
    assert seam_score(InMemory(stripes), EDGES, EDGES) == pytest.approx(1.0, abs=0.05)
    assert seam_score(InMemory(stripes), EDGES, []) == pytest.approx(1.0, abs=0.05)


def test_bands_do_not_change_the_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = smooth_noise(1200, 700)
    image = Image.create(tmp_path / "i", 1200, 700, 0.5, "t", {})
    assert list(image.fill([pixels])) == [1024, 1200]
    whole = seam_score(image, EDGES, [256, 512])
    monkeypatch.setattr("engine.images.metrics.BAND_PX", 64)
    assert seam_score(image, EDGES, [256, 512]) == whole
    assert seam_score(InMemory(pixels), [64], []) == pytest.approx(brute_score(pixels, 64))


def brute_score(pixels: np.ndarray, edge: int) -> float:
    rows = np.abs(np.diff(pixels.astype(float), axis=1)).mean(axis=(0, 2))
    return rows[edge - 1] / np.delete(rows, edge - 1).mean()


def test_scores_without_borders_or_gradients():
    flat = np.full((3, 64, 64), 9, np.uint8)
    assert seam_score(InMemory(flat), [0, 64], []) is None
    assert seam_score(InMemory(flat), [32], []) == 1.0
    flat[:, 32:] = 10
    assert seam_score(InMemory(flat), [32], []) == math.inf
    with pytest.raises(ValueError, match=r"0\.\.64"):
        seam_score(InMemory(flat), [65], [])


def test_consistency_is_the_psnr_of_the_box_average():
    guide = np.random.default_rng(0).integers(0, 250, (3, 40, 30), dtype=np.uint8)
    picture = guide.repeat(16, axis=1).repeat(16, axis=2)
    assert consistency_psnr(InMemory(picture), guide) == math.inf
    assert consistency_psnr(InMemory(picture + np.uint8(2)), guide) == pytest.approx(20 * math.log10(255 / 2))
    picture[:, ::2] += 4  # the average shifts by 2 as well
    assert consistency_psnr(InMemory(picture), guide) == pytest.approx(20 * math.log10(255 / 2))


def test_guide_of_another_field_is_refused():
    with pytest.raises(ValueError, match="Crop the guide"):
        consistency_psnr(InMemory(np.zeros((3, 64, 64), np.uint8)), np.zeros((3, 4, 5), np.uint8))


def test_report_is_json_with_versions_and_times(tmp_path: Path):
    facts = {"seam_score": math.inf, "levels": (1, float("nan")), "restarts": 0}
    write_report(tmp_path / "report.json", facts, {"denoise": 1.23456}, {"ray": "2.60.0"})
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["seam_score"] is None
    assert report["levels"] == [1, None]
    assert report["timings_s"] == {"denoise": 1.235}
    assert {"python", "numpy", "torch", "diffusers", "ray"} <= report["versions"].keys()
    assert report["machine"]["cpus"] >= 1


def test_full_disk_keeps_the_previous_report(tmp_path: Path):
    write_report(tmp_path / "report.json", {"run": 1}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(CanvasError, match=r"report\.json cannot be written"):
            write_report(tmp_path / "report.json", {"run": 2}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads((tmp_path / "report.json").read_text())["run"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
