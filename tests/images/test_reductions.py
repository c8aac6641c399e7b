"""Figures over blocks are those over bands."""

from dataclasses import asdict
from typing import Any

import dask.array as da
import numpy as np
import pytest
from scipy import ndimage

from engine.core import lazy
from engine.images import reductions
from engine.images.detail import detail_of
from engine.images.metrics import InMemory, seam_scores

RNG = np.random.default_rng(0)
SMOOTH = ndimage.gaussian_filter(RNG.normal(size=(3, 450, 330)), (0, 2, 2))
PIXELS = np.clip(200 + 350 * SMOOTH, 0, 255).astype(np.uint8)
PIXELS[:, :, 256:] //= 2


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "CHUNK_PX", 128)


def picture(pixels: np.ndarray = PIXELS, chunks: Any = (3, 128, 128)) -> da.Array:
    return da.from_array(pixels, chunks=chunks)


@pytest.mark.parametrize("chunks", [(3, 128, 192), (1, 100, 77), (3, 449, 329), (3, 450, 330)])
def test_figures_are_those_of_bands(chunks: tuple[int, int, int]) -> None:
    found = picture(chunks=chunks)
    edges = [128, 256], [64, 256]
    assert reductions.seam_scores(found, *edges) == pytest.approx(seam_scores(InMemory(PIXELS), *edges), rel=1e-12)
    whole = detail_of(InMemory(PIXELS))
    assert reductions.tissue_share(found) == whole.tissue_share
    for key, value in asdict(reductions.detail(found)).items():
        assert value == pytest.approx(asdict(whole)[key], rel=1e-6, abs=1e-9), key
    counted = np.stack([np.bincount(colour.ravel(), minlength=256) for colour in PIXELS])
    np.testing.assert_array_equal(reductions.colour_histograms(found), counted)


def test_the_seam_profile_shows_where() -> None:
    across_y, across_x = reductions.seam_profile(picture())
    assert (across_y.shape, across_x.shape, across_y[0], across_x[0]) == ((450,), (330,), 0, 0)
    assert across_x.argmax() == 256


def test_differences() -> None:
    other = PIXELS.copy()
    other[1, 300, 200] ^= 255
    gap = abs(int(other[1, 300, 200]) - int(PIXELS[1, 300, 200]))
    found = reductions.difference(picture(), picture(other, (3, 200, 200)))
    assert (found.largest, found.differing_share) == (gap, 1 / (450 * 330))
    assert found.mean == pytest.approx(gap / PIXELS.size)
    assert found.psnr_db == pytest.approx(10 * np.log10(255**2 * PIXELS.size / gap**2))
    assert reductions.difference(picture(), picture()).psnr_db == np.inf


def test_other_arrays_are_refused() -> None:
    for wrong in (picture(PIXELS.astype(np.float32)), picture(PIXELS[:1], (1, 128, 128))):
        with pytest.raises(ValueError, match="must be a dask array uint8"):
            reductions.seam_profile(wrong)
    with pytest.raises(ValueError, match="one size"):
        reductions.difference(picture(), picture(PIXELS[:, 1:]))


def test_blocks_are_large() -> None:
    assert lazy.CHUNK_PX == 2048
    assert lazy.CHUNK_PX % reductions.PIECE_PX == 0
