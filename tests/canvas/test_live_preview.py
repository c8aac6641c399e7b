"""Previews of a run at work: whole files of one step, in the run's colours, for a small share of its time."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from engine.canvas.live_preview import (
    LONGEST_PX,
    LivePreviews,
    PreviewFacts,
    Shown,
    affine_colour,
    read_facts,
    read_speed,
    with_facts,
)

FACTS = PreviewFacts("20x", "20x", 3, 8, 325, 225, 1, 1, 0.5)
SHOWN = Shown(lambda latents: latents, {"20x": 1, "5x": 4}, 0.5, tiles=lambda: 4, replicas=lambda: 1)


def give(previews: LivePreviews, number: int, x0: np.ndarray, level: str = "20x", steps: int = 8) -> None:
    for y0 in range(0, x0.shape[1], 256):
        rows = np.ascontiguousarray(x0[:, y0 : y0 + 256])
        previews.rows(level, (x0.shape[1], x0.shape[2]), number, number == steps - 1, y0, rows)


def shown(folder: Path, level: str = "20x") -> np.ndarray:
    return simplejpeg.decode_jpeg((folder / "live" / f"{level}.jpg").read_bytes(), "RGB").astype(int)


def test_facts_travel_with_their_px() -> None:
    data = with_facts(np.full((4, 5, 3), 90, np.uint8), FACTS)
    assert read_facts(data) == FACTS
    assert simplejpeg.decode_jpeg(data, "RGB").shape == (4, 5, 3)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xfe\xff\xff{", b"\xff\xd8\xff\xfe\0\x04{}"])
def test_other_files_have_none(data: bytes) -> None:
    assert read_facts(data) is None


def test_facts_that_cannot_be() -> None:
    for wrong in (replace(FACTS, step=-1), replace(FACTS, mpp=0.0), replace(FACTS, level=3)):  # type: ignore[arg-type]
        assert read_facts(with_facts(np.zeros((1, 1, 3), np.uint8), wrong)) is None


def test_px_are_the_mapped_latents(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = np.repeat(np.repeat(rng.uniform(-0.9, 0.9, (3, 30, 20)), 10, 1), 10, 2).astype(np.float32)
    matrix, offset = np.diag([0.5, -0.5, 0.25]), np.array([0.1, 0.0, -0.1])
    previews = LivePreviews(tmp_path, replace(SHOWN, colour=affine_colour(matrix, offset)))
    previews.committed("20x", -1, 8)
    give(previews, 0, smooth)
    assert not (tmp_path / "live" / "20x.jpg").exists()  # nothing is shown before it is committed
    previews.committed("20x", 0, 8)
    wanted = (np.einsum("ij,jhw->hwi", matrix, smooth) + offset + 1) * 127.5
    assert np.abs(shown(tmp_path) - wanted).mean() < 3
    facts = read_facts((tmp_path / "live" / "20x.jpg").read_bytes())
    assert facts == PreviewFacts("20x", "20x", 1, 8, 300, 200, 1, 1, 0.5)


def test_a_large_canvas_is_reduced(tmp_path: Path) -> None:
    previews = LivePreviews(tmp_path, SHOWN)
    previews.committed("20x", -1, 8)
    size = (600, 2 * LONGEST_PX + 3)
    x0 = np.full((3, *size), -0.5, np.float32)
    x0[:, :, 1000:] = 0.5
    give(previews, 0, x0)
    previews.committed("20x", 0, 8)
    found = shown(tmp_path)
    assert found.shape == (150, -(-size[1] // 4), 3)
    assert (abs(found[:, :240] - 64) < 4).all()
    assert (abs(found[:, 260:] - 191) < 4).all()


def test_a_level_that_is_ahead_waits_for_its_step(tmp_path: Path) -> None:
    previews = LivePreviews(tmp_path, SHOWN, share=1e9)
    previews.committed("20x", -1, 3)
    for number, level, grey in ((0, "5x", 0.0), (1, "5x", 0.5), (0, "20x", 0.0)):
        give(previews, number, np.full((3, 64, 64), grey, np.float32), level, 3)
    previews.committed("20x", 0, 3)
    assert abs(shown(tmp_path, "5x").mean() - 127) < 2
    give(previews, 1, np.zeros((3, 64, 64), np.float32), "20x", 3)
    previews.committed("20x", 1, 3)
    assert abs(shown(tmp_path, "5x").mean() - 191) < 2


def test_what_costs_too_much_is_left_out_but_for_the_first_and_last_step(tmp_path: Path) -> None:
    previews = LivePreviews(tmp_path, SHOWN, share=0.0)
    previews.committed("20x", -1, 4)
    seen = []
    for number in range(4):
        give(previews, number, np.zeros((3, 64, 64), np.float32), steps=4)
        previews.committed("20x", number, 4)
        path = tmp_path / "live" / "20x.jpg"
        facts = read_facts(path.read_bytes()) if path.exists() else None
        seen.append(0 if facts is None else facts.step)
    assert seen == [1, 1, 1, 4]
    assert previews.spent_s > 0


def test_without_a_colour_map_there_is_the_speed(tmp_path: Path) -> None:
    previews = LivePreviews(tmp_path, replace(SHOWN, colour=None))
    previews.committed("20x", -1, 1)
    give(previews, 0, np.zeros((3, 64, 64), np.float32), steps=1)
    previews.committed("20x", 0, 1)
    speed = read_speed(tmp_path)
    assert speed is not None
    assert (speed.step, speed.steps, speed.replicas, speed.pass_name) == (1, 1, 1, "20x")
    assert not (tmp_path / "live" / "20x.jpg").exists()
    assert read_speed(tmp_path / "nowhere") is None


def test_a_disk_that_refuses_costs_the_previews_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "live").write_text("in the way")
    previews = LivePreviews(tmp_path, SHOWN)
    with caplog.at_level(logging.WARNING):
        for number in range(-1, 3):
            if number >= 0:
                give(previews, number, np.zeros((3, 64, 64), np.float32), steps=3)
            previews.committed("20x", number, 3)
    assert [record.message for record in caplog.records if "no more live previews" in record.message]
    assert len(caplog.records) == 1
    assert (tmp_path / "live").read_text() == "in the way"
