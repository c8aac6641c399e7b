import numpy as np
import pytest

from engine.sampling.blend import RowAverager, gaussian_weight, smooth_weight, uniform_weight
from engine.sampling.plan import make_tiling

WEIGHTS = [uniform_weight(64), smooth_weight(64), gaussian_weight(64, 0.8)]


def average(weight: np.ndarray, stride: int, height: int, width: int, make_tile) -> np.ndarray:
    tiling = make_tiling(height, width, stride, 1)
    averager, rows = RowAverager(3, width, weight), []
    for tile in range(len(tiling)):
        y, x = tiling.corner(tile)
        averager.add(y, x, make_tile(y, x))
        rows.append(averager.pop(tiling.finished_rows(tile, height)))
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("stride", "height", "width"), [(48, 64, 64), (48, 100, 203), (16, 130, 90), (64, 128, 65)])
def test_constant_in_constant_out(weight: np.ndarray, stride: int, height: int, width: int) -> None:
    out = average(weight, stride, height, width, lambda y, x: np.full((3, 64, 64), 0.7, np.float32))
    assert out.shape == (3, height, width)
    np.testing.assert_allclose(out, 0.7, rtol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_tiles_of_one_picture_give_that_picture(weight: np.ndarray) -> None:
    picture = np.random.default_rng(0).standard_normal((3, 150, 210)).astype(np.float32)
    out = average(weight, 40, 150, 210, lambda y, x: picture[:, y : y + 64, x : x + 64])
    np.testing.assert_allclose(out, picture, atol=1e-5)


def test_an_uncovered_px_is_named() -> None:
    averager = RowAverager(1, 70, uniform_weight(64))
    averager.add(0, 0, np.zeros((1, 64, 64), np.float32))
    with pytest.raises(ValueError, match=r"covered by a tile; \(y=0, x=64\) is not"):
        averager.pop(64)


def test_a_tile_above_the_closed_rows_is_refused() -> None:
    averager = RowAverager(1, 64, uniform_weight(64))
    averager.add(0, 0, np.zeros((1, 64, 64), np.float32))
    averager.pop(10)
    with pytest.raises(ValueError, match="top row first"):
        averager.add(5, 0, np.zeros((1, 64, 64), np.float32))
