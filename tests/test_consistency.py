"""A picture moved onto its guide: exact where it can be, and the same however the stream is cut."""

import numpy as np
import pytest

from engine.consistency import BAND_PX, consistent_rows, rows_above
from engine.strips import cut

DRAW = np.random.default_rng(0)


def picture(height: int, width: int) -> np.ndarray:
    return DRAW.uniform(-0.4, 0.4, (3, height, width)).astype(np.float32)


def chunks(whole: np.ndarray, first: int, size: int):
    return (whole[:, y : y + size] for y in range(first, whole.shape[1], size))


def moved(whole: np.ndarray, guide: np.ndarray, factor: int, size: int = 100, start: int = 0) -> np.ndarray:
    first = max(start - rows_above(factor), 0)
    rows = consistent_rows(chunks(whole, first, size), whole.shape[1], guide, factor, start)
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
    monkeypatch.setattr("engine.consistency.BAND_PX", 1024)
    np.testing.assert_allclose(banded, moved(whole, guide, 4), atol=1e-6)


def test_a_guide_may_reach_beyond_the_picture() -> None:
    whole, guide = picture(510, 250), np.full((3, 256, 256), 0.1, np.float32)
    found = moved(whole, guide, 4)
    assert found.shape == whole.shape
    inner = np.concatenate(list(cut([found], (0, 508), (0, 248))), axis=1).reshape(3, 127, 4, 62, 4).mean(axis=(2, 4))
    assert np.abs(inner - 0.1).max() < 0.03
