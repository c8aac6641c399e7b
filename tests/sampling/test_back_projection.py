"""A picture moved onto its guide, and a guide enlarged: exact where they can be, the same however they are cut."""

import numpy as np
import pytest
import torch

from engine.core.numerics import resize_by
from engine.core.streaming import cut
from engine.core.units import LATENT_FACTOR, TILE_PX
from engine.sampling.back_projection import BAND_PX, GuideWindows, consistent_rows, moved_onto, rows_above
from engine.sampling.config import GuidanceConfig
from engine.sampling.guidance import GuidePicture

DRAW = np.random.default_rng(0)


def picture(height: int, width: int) -> np.ndarray:
    return DRAW.uniform(-0.4, 0.4, (3, height, width)).astype(np.float32)


def chunks(whole: np.ndarray, first: int, size: int):
    return (whole[:, y : y + size] for y in range(first, whole.shape[1], size))


def moved(
    whole: np.ndarray, guide: np.ndarray, factor: int, size: int = 100, start: int = 0, most: int = 255
) -> np.ndarray:
    first = max(start - rows_above(factor), 0)
    rows = consistent_rows(chunks(whole, first, size), whole.shape[1], guide, factor, start, most)
    return np.concatenate(list(rows), axis=1)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_reduced_it_is_the_guide(factor: int) -> None:
    whole = picture(640, 320)
    guide = DRAW.uniform(-0.5, 0.5, (3, 640 // factor, 320 // factor)).astype(np.float32)
    found = moved(whole, guide, factor)
    reduced = found.reshape(3, 640 // factor, factor, 320 // factor, factor).mean(axis=(2, 4))
    before = whole.reshape(3, 640 // factor, factor, 320 // factor, factor).mean(axis=(2, 4))
    assert np.abs(reduced - guide).mean() < 0.02 * np.abs(before - guide).mean()


def test_a_picture_that_agrees_stays() -> None:
    whole = picture(512, 256)
    guide = whole.reshape(3, 128, 4, 64, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(moved(whole, guide, 4), whole, atol=1e-6)


def test_a_nucleus_that_the_guide_has_not_stays_without_an_outline() -> None:
    """As a dark disc drawn on an even guide: wholly moved it becomes a ring; within a bound it stays a disc."""
    y, x = np.mgrid[:512, :256]
    disc = (y - 256) ** 2 + (x - 128) ** 2 < 10**2
    whole = np.where(disc, -0.6, 0.2).astype(np.float32) * np.ones((3, 1, 1), np.float32)
    guide = np.full((3, 128, 64), 0.2, np.float32)
    bounded = moved(whole, guide, 4, most=8)
    assert np.abs(bounded - whole).max() < 2 * 8 / 127.5
    assert bounded[0][disc].max() < -0.4
    assert moved(whole, guide, 4)[0][~disc].max() > 0.4, "else there is no outline to bound"


def test_how_far_is_settled_by_where_the_canvas_begins() -> None:
    settled = {start: GuidanceConfig().settled(start).back_projection for start in (200, 300, 301, 1000)}
    assert settled == {200: 255, 300: 255, 301: 8, 1000: 8}
    assert GuidanceConfig(method="none").settled(200).back_projection == 0
    assert GuidanceConfig(back_projection=20).settled(1000).back_projection == 20


def test_detail_stays() -> None:
    """What is added is smooth: neighbouring px move almost alike."""
    whole, guide = picture(512, 256), np.zeros((3, 128, 64), np.float32)
    added = moved(whole, guide, 4) - whole
    assert np.abs(np.diff(added, axis=1)).mean() < 0.2 * np.abs(np.diff(whole, axis=1)).mean()


def test_bytes_depend_neither_on_chunks_nor_on_where_it_was_continued() -> None:
    whole, guide = picture(1100, 96), DRAW.uniform(-0.5, 0.5, (3, 275, 24)).astype(np.float32)
    once = moved(whole, guide, 4)
    assert np.array_equal(moved(whole, guide, 4, size=37), once)
    for start in (BAND_PX, 2 * BAND_PX, 4 * BAND_PX):
        assert np.array_equal(moved(whole, guide, 4, start=start), once[:, start:])


def test_a_band_is_what_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, guide = picture(1024, 96), DRAW.uniform(-0.5, 0.5, (3, 256, 24)).astype(np.float32)
    banded = moved(whole, guide, 4)
    monkeypatch.setattr("engine.sampling.back_projection.BAND_PX", 1024)
    np.testing.assert_allclose(banded, moved(whole, guide, 4), atol=1e-6)


def test_a_guide_may_reach_beyond_the_picture() -> None:
    whole, guide = picture(510, 250), np.full((3, 256, 256), 0.1, np.float32)
    found = moved(whole, guide, 4)
    assert found.shape == whole.shape
    inner = np.concatenate(list(cut([found], (0, 508), (0, 248))), axis=1).reshape(3, 127, 4, 62, 4).mean(axis=(2, 4))
    assert np.abs(inner - 0.1).max() < 0.03


@pytest.mark.parametrize("ratio", [2, 6, 16])
def test_windows_of_a_guide_show_what_the_whole_enlarged_guide_shows(ratio: int) -> None:
    image = np.random.default_rng(ratio).uniform(-1, 1, (3, 200, 220)).astype(np.float32)
    small = torch.as_tensor(image)[None]
    whole = moved_onto(resize_by(small, ratio), small, ratio)[0].numpy()
    first = (15 * ratio) // LATENT_FACTOR + 1  # so far from the border that nothing is repeated for a window
    corners = [(first, first + 2), (first + 1, first)]
    windows = GuideWindows.of(GuidePicture(image, ratio), corners)
    for (y, x), tile in zip(corners, windows.enlarged().numpy(), strict=True):
        top, left = y * LATENT_FACTOR, x * LATENT_FACTOR
        expected = whole[:, top : top + TILE_PX, left : left + TILE_PX]
        np.testing.assert_allclose(tile, expected, atol=1e-5)  # the whole picture's places are rounded otherwise


def test_a_window_has_the_same_bytes_in_any_batch() -> None:
    guide = GuidePicture(np.random.default_rng(0).uniform(-1, 1, (3, 70, 90)).astype(np.float32), ratio=6)
    corners = [(0, 0), (41, 7), (64, 90)]
    together = GuideWindows.of(guide, corners).enlarged()
    alone = [GuideWindows.of(guide, [corner]).enlarged()[0] for corner in corners]
    assert torch.equal(together, torch.stack(alone))


def test_past_the_border_of_a_guide_its_last_px_is_repeated() -> None:
    image = np.zeros((3, 64, 64), np.float32)
    image[:, :, -30:] = 0.5
    tile = GuideWindows.of(GuidePicture(image, ratio=4), [(0, 64)]).enlarged()[0]
    assert torch.equal(tile, torch.full_like(tile, 0.5))
