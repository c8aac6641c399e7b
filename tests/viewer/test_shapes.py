"""GeoJSON in both directions: QuPath's kinds of objects come in, hostile files do not."""

import json

import pytest

from engine.core.errors import EngineError
from engine.viewer.shapes import LARGEST_BYTES, read_shapes, squares

RING = [[0, 0], [10, 0], [10, 5], [0, 0]]


def feature(geometry: dict, **properties: object) -> dict:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def read(content: object) -> dict:
    return read_shapes(json.dumps(content).encode())


def test_objects_as_qupath_writes_them() -> None:
    annotation = feature(
        {"type": "Polygon", "coordinates": [RING, RING]},
        name="<script>alert(1)</script>", classification={"name": "Tumor", "color": [200, 0, 300]},
        measurements={"Area µm^2": 12.5, "NaN": "NaN"},
    )  # fmt: skip
    point = feature({"type": "Point", "coordinates": [1.5, 2]}, classification={"name": "Cell", "colorRGB": -65536})
    line = feature({"type": "LineString", "coordinates": [[0, 0], [1, 1]]})
    many = feature({"type": "MultiPolygon", "coordinates": [[RING], [RING, RING]]})
    found = read({"type": "FeatureCollection", "features": [annotation, point, line, many]})
    first, second, third, fourth = found["shapes"]
    assert first["name"] == "<script>alert(1)</script>"  # text, which the page shows as text
    assert (first["kind"], first["colour"], first["measurements"]) == ("Tumor", [200, 0, 255], {"Area µm^2": 12.5})
    assert (second["rings"], second["colour"], second["closed"]) == ([[(1.5, 2.0)]], [255, 0, 0], False)
    assert (len(third["rings"]), third["closed"]) == (1, False)
    assert (len(fourth["rings"]), fourth["closed"]) == (3, True)


def test_a_list_one_feature_and_what_cannot_be_drawn() -> None:
    polygon = feature({"type": "Polygon", "coordinates": [RING]})
    assert len(read([polygon, polygon])["shapes"]) == 2
    assert len(read(polygon)["shapes"]) == 1
    assert read([polygon, feature({"type": "Curve"})]) == {"shapes": read(polygon)["shapes"], "skipped": 1}


@pytest.mark.parametrize(
    "content",
    [b"", b"no json", b"7", b'"text"', b'{"features": 3}', b"[3]", b"[[]]", b'{"features": [{}]}', b"\xff\xfe",
     b"[" * 100_000, b'[{"geometry": {"type": "Point", "coordinates": [NaN, 1]}}]',
     b'[{"geometry": {"type": "Point", "coordinates": [1]}}]',
     b'[{"geometry": {"type": "Polygon", "coordinates": 5}}]',
     b'[{"geometry": {"type": "Point", "coordinates": [1e999, 1]}}]'],
)  # fmt: skip
def test_what_is_no_geojson(content: bytes) -> None:
    with pytest.raises(EngineError, match="must be GeoJSON"):
        read_shapes(content)


def test_a_large_file_is_refused_with_the_limit() -> None:
    with pytest.raises(EngineError, match="at most 32 MiB"):
        read_shapes(b" " * (LARGEST_BYTES + 1))


def test_tiles_come_back_as_they_went_out() -> None:
    made = squares("s", [[0, 10], [512, 10]], (512.0, 512.5), {"attention": [0.25, 0.75]})
    assert len({f["id"] for f in made["features"]}) == 2
    found = read(made)["shapes"]
    assert found[1]["rings"] == [[(512, 10), (1024, 10), (1024, 522.5), (512, 522.5), (512, 10)]]
    assert found[1]["measurements"] == {"attention": 0.75}
