import numpy as np
import pytest

from engine.decode import decode_rows, to_uint8
from engine.pointwise import PointwiseDenoiser
from engine.tiles import make_tiling


@pytest.mark.parametrize("start", [0, 60, 63, 64, 100])
def test_the_picture_streams_from_any_row_on(start: int) -> None:
    latents = np.random.default_rng(0).standard_normal((3, 130, 90)).astype(np.float32)
    tiling = make_tiling(130, 90, 40, 4)
    read = lambda y0, y1: latents[:, y0:y1]  # noqa: E731
    rows = np.concatenate(list(decode_rows(read, (130, 90), tiling, PointwiseDenoiser(), 0.8, "d", start)), axis=1)
    expected = latents.repeat(4, 1).repeat(4, 2)[:, start * 4 :]
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_bytes_are_truncated_and_clamped_as_published() -> None:
    assert to_uint8(np.float32([-2, -1, 0, 0.999, 1, 3])).tolist() == [0, 0, 127, 254, 255, 255]
