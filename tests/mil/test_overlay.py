"""Maps: tiles lie where their coordinates say, colours follow ranks, and GeoJSON is what QuPath reads."""

import json

import numpy as np
import pytest
from PIL import Image

from mil.errors import RunError
from mil.report.overlay import BINS, AttentionMap, draw, geojson


def map_of(side: int = 4, tile: float = 512.0, size: tuple[int, int] | None = (4096, 4096)) -> AttentionMap:
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2) * int(tile)
    attention = np.arange(1.0, side * side + 1)
    return AttentionMap("s", attention / attention.sum(), grid.astype(np.int64), (tile, tile), size)


def test_ranks() -> None:
    found = AttentionMap("s", np.array([0.7, 0.1, 0.1, 0.1]), np.zeros((4, 2), np.int64), (1, 1), None)
    assert found.ranks.tolist() == [1, 1 / 3, 1 / 3, 1 / 3]
    assert AttentionMap("s", np.ones(1), np.zeros((1, 2), np.int64), (1, 1), None).ranks.tolist() == [1]


def test_tiles_lie_where_they_are() -> None:
    picture = np.asarray(draw(map_of(), Image.new("RGB", (512, 512), "white"), 512)).astype(int)
    assert (picture[300:500, 300:500] == 255).all()
    assert (picture[:256, :256].min(axis=2) < 250).all()
    first, last = picture[10, 10], picture[250, 250]
    assert first[2] > first[0]  # least: violet
    assert last[0] > last[2]  # most: yellow


def test_without_a_thumbnail_it_is_drawn_on_white() -> None:
    picture = draw(map_of(size=None), None, 256)
    assert picture.size == (256, 256 + 28)


def test_a_thumbnail_is_not_enlarged() -> None:
    assert draw(map_of(), Image.new("RGB", (300, 300)), 2048).width == 300


def test_geojson() -> None:
    found = json.loads(geojson(map_of(tile=682.5)))
    assert found["type"] == "FeatureCollection"
    last = found["features"][-1]
    assert last["properties"]["objectType"] == "tile"
    assert last["properties"]["classification"]["name"] == f"Attention {BINS} of {BINS}"
    ring = last["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1] == [2046, 2046]
    assert ring[2] == [2728.5, 2728.5]


def test_coordinates_of_another_number_are_refused() -> None:
    with pytest.raises(RunError, match="4 for 3"):
        AttentionMap("s", np.ones(3), np.zeros((4, 2), np.int64), (1, 1), None)
