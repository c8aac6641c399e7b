import numpy as np
import pytest

from engine.core.streaming import BandReader, in_bands
from engine.sampling.plan import gather_tiles, make_tiling

ROWS = np.arange(3 * 300 * 70, dtype=np.float32).reshape(3, 300, 70)


@pytest.mark.parametrize("halo", [0, 8, 40, 200])
@pytest.mark.parametrize("chunk", [1, 64, 300])
def test_bands_cover_every_row_once_with_their_halo(halo: int, chunk: int) -> None:
    chunks = (ROWS[:, y : y + chunk] for y in range(0, 300, chunk))
    seen = []
    for top, y0, y1, rows in in_bands(chunks, 300, 128, halo):
        assert top == max(y0 - halo, 0)
        assert np.array_equal(rows, ROWS[:, top : min(y1 + halo, 300)])
        seen.append((y0, y1))
    assert seen == [(0, 128), (128, 256), (256, 300)]


def test_a_reader_reads_each_band_once_when_walked_downwards() -> None:
    asked = []

    def read(y0: int, y1: int) -> np.ndarray:
        asked.append(y0)
        return ROWS[:, y0:y1]

    reader = BandReader(read, 300, 64)
    for y in range(0, 300 - 64, 16):
        assert np.array_equal(reader(y, y + 64), ROWS[:, y : y + 64])
    assert asked == [0, 64, 128, 192, 256]


def test_a_short_batch_is_padded_with_its_last_tile() -> None:
    tiling = make_tiling(300, 70, 64, 4)
    last = list(tiling.batches())[-1]
    found = gather_tiles(lambda y0, y1: ROWS[:, y0:y1], tiling, last)
    assert found.shape == (4, 3, 64, 64)
    y, x = tiling.corner(last[-1])
    assert np.array_equal(found[-1], ROWS[:, y : y + 64, x : x + 64])
