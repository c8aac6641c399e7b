import numpy as np
import pytest

from engine.core.numerics import noise_rows


def test_any_window_is_cut_from_the_same_noise() -> None:
    whole = noise_rows(7, "joint/20x", 3, (0, 200), 150)
    for y0, y1 in ((0, 64), (64, 200), (10, 70), (199, 200)):
        assert np.array_equal(noise_rows(7, "joint/20x", 3, (y0, y1), 150), whole[:, y0:y1])
    assert np.array_equal(noise_rows(7, "joint/20x", 3, (0, 200), 90), whole[:, :, :90])


@pytest.mark.parametrize("other", [(8, "joint/20x", 3), (7, "joint/5x", 3), (7, "joint/20x", 4)])
def test_seed_stream_and_step_each_change_it(other: tuple[int, str, int]) -> None:
    a = noise_rows(7, "joint/20x", 3, (0, 64), 64)
    b = noise_rows(*other, (0, 64), 64)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05


def test_blocks_are_independent_and_standard_normal() -> None:
    noise = noise_rows(0, "s", 0, (0, 256), 256)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    blocks = noise.reshape(3, 4, 64, 4, 64).transpose(1, 3, 0, 2, 4).reshape(16, -1)
    correlation = np.corrcoef(blocks) - np.eye(16)
    assert np.abs(correlation).max() < 0.05
