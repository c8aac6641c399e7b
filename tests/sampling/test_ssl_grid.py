import numpy as np
import pytest

from engine.sampling.ssl_grid import TileVectors, extend_grid, slerp, tile_cells


@pytest.fixture
def grid() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((16, 20, 24)).astype(np.float32)


def test_on_the_grid_a_tile_gets_its_own_cells(grid: np.ndarray) -> None:
    assert np.array_equal(tile_cells(grid, 128, 64, 1), grid[:, 2:3, 1:2])
    assert np.array_equal(tile_cells(grid, 64, 0, 4), grid[:, 4:8, 0:4])
    pooled = grid[:, :16, :16].reshape(16, 8, 2, 8, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(tile_cells(grid, 0, 0, 16), pooled, atol=1e-6)


def test_between_cells_the_mix_moves_steadily_from_one_to_the_other(grid: np.ndarray) -> None:
    a, b = grid[:, 3, 3], grid[:, 3, 4]

    def similarity(x: int) -> tuple[float, float]:
        v = tile_cells(grid, 3 * 64, x, 1)[:, 0, 0]
        return tuple(float(v @ e / np.linalg.norm(v) / np.linalg.norm(e)) for e in (a, b))

    path = [similarity(3 * 64 + i) for i in range(0, 65, 16)]
    assert [p[0] for p in path] == sorted((p[0] for p in path), reverse=True)
    assert path[0][0] == pytest.approx(1, abs=1e-6)
    assert path[-1][1] == pytest.approx(1, abs=1e-6)


def test_rows_and_columns_are_not_swapped(grid: np.ndarray) -> None:
    mixed = tile_cells(grid, 5 * 64, 7 * 64 + 32, 1)[:, 0, 0]
    expected = slerp(grid[:, 5, 7], grid[:, 5, 8], 0.5)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_past_the_edge_the_last_cell_is_repeated(grid: np.ndarray) -> None:
    np.testing.assert_allclose(tile_cells(grid, 19 * 64 + 20, 0, 1)[:, 0, 0], grid[:, 19, 0], rtol=1e-5)


def test_slerp_keeps_the_length_of_unit_vectors_and_falls_back_to_lerp() -> None:
    a, b = np.float32([1, 0]), np.float32([0, 1])
    assert np.linalg.norm(slerp(a, b, 0.3)) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(slerp(a, 3 * a, 0.5), 2 * a)
    np.testing.assert_allclose(slerp(a, -a, 0.25), 0.5 * a)


def test_extending_mirrors_the_grid(grid: np.ndarray) -> None:
    wide = extend_grid(grid, 22, 20)
    assert wide.shape == (16, 22, 24)
    assert np.array_equal(wide[:, 20:], grid[:, 19:17:-1])


@pytest.mark.parametrize("width", [8, 16, 96, 1024])
@pytest.mark.parametrize("stride", [64, 48, 41])
def test_a_batch_has_the_bytes_of_its_tiles_one_by_one(width: int, stride: int) -> None:
    draw = np.random.default_rng(width)
    grid = draw.standard_normal((width, 20, 24)).astype(np.float32)
    grid[:, 5], grid[:, :, 7] = 2 * grid[:, 6], -grid[:, :, 8]  # parallel and opposite neighbours
    corners = [(int(y), int(x)) for y, x in draw.integers(0, 24, (16, 2)) * stride]
    vectors = TileVectors(grid)
    for factor in (1, 4):
        wanted = np.stack([tile_cells(grid, y, x, factor) for y, x in corners])
        for _ in range(2):  # the second time they are remembered
            found = vectors.under(corners, factor)
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            assert found.tobytes() == wanted.tobytes()


def test_vectors_are_kept_while_there_is_room(grid: np.ndarray) -> None:
    first, second = [(0, 0), (0, 48)], [(48, 0), (48, 48)]
    vectors = TileVectors(grid, kept_nbytes=2 * 16 * 4)
    assert vectors.under(first, 1) is vectors.under(first, 1)
    assert vectors.under(second, 1) is not vectors.under(second, 1)
