"""The decoded picture: what zarr reads, its pyramid, and every loss as an error."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from engine.core.errors import CanvasError
from engine.images.ome_zarr import Image, halve
from tests.support.known_picture import HEIGHT, PIXELS, PROVENANCE, WIDTH, full_disk, image_of, pixels_of


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return image_of(tmp_path_factory.mktemp("image") / "image.ome.zarr")


def test_picture_is_valid_ome_zarr(image: Image):
    group = zarr.open_group(str(image.path), mode="r")
    ome = json.loads(json.dumps(group.attrs["ome"]))
    (scales,) = ome["multiscales"]
    assert ome["version"] == "0.5"
    assert [(a["name"], a["type"], a.get("unit")) for a in scales["axes"]] == [
        ("c", "channel", None), ("y", "space", "micrometer"), ("x", "space", "micrometer")]  # fmt: skip
    transforms = [d["coordinateTransformations"] for d in scales["datasets"]]
    assert [t[0]["scale"] for t in transforms] == [[1, 0.5, 0.5], [1, 1, 1], [1, 2, 2]]
    assert [t[1]["translation"] for t in transforms] == [[0, 0, 0], [0, 0.25, 0.25], [0, 0.75, 0.75]]
    assert [c["color"] for c in ome["omero"]["channels"]] == ["FF0000", "00FF00", "0000FF"]
    assert group.attrs["zoomldm_engine"] == {"synthetic": True, **PROVENANCE}
    array = group["0"]
    assert isinstance(array, zarr.Array)
    assert (array.shape, array.dtype, array.metadata.to_dict()["dimension_names"]) == (
        (3, HEIGHT, WIDTH), np.uint8, ("c", "y", "x"))  # fmt: skip
    np.testing.assert_array_equal(np.asarray(array[:]), PIXELS)


def test_pyramid_is_the_box_average_of_the_whole_picture(image: Image):
    assert image.sizes == [(1300, 900), (650, 450), (325, 225)]
    expected = PIXELS
    for level, (h, _) in enumerate(image.sizes):
        np.testing.assert_array_equal(image.read(0, h, level=level), expected)
        expected = halve(expected)


def test_halving_averages_what_is_there_at_odd_borders():
    block = np.array([[[0, 2, 10], [4, 6, 20], [8, 9, 30]]] * 3, np.uint8)
    np.testing.assert_array_equal(halve(block)[0], [[3, 15], [9, 30]])


def test_interrupted_decoding_goes_on_from_the_last_band(tmp_path: Path):
    image = Image.create(tmp_path / "i", HEIGHT, WIDTH, 0.5, "test", {})
    done = next(image.fill(PIXELS[:, y : y + 100] for y in range(0, HEIGHT, 100)))
    assert done == 1024
    again = Image.open(tmp_path / "i")
    assert list(again.fill([PIXELS[:, done:]], start=done)) == [HEIGHT]
    np.testing.assert_array_equal(again.read(0, HEIGHT), PIXELS)


@pytest.mark.parametrize(("rows", "says"), [(900, "900 came"), (1301, "1301 came")])
def test_stream_of_another_height_is_an_error(tmp_path: Path, rows: int, says: str):
    image = Image.create(tmp_path / "i", HEIGHT, WIDTH, 0.5, "test", {})
    with pytest.raises(ValueError, match=says):
        list(image.fill([pixels_of(rows)]))


@pytest.mark.parametrize(("y0", "n"), [(100, 512), (0, 511), (1024, 300), (0, 0)])
def test_only_whole_chunks_are_written(tmp_path: Path, y0: int, n: int):
    image = Image.create(tmp_path / "i", HEIGHT, WIDTH, 0.5, "test", {})
    with pytest.raises(ValueError, match="multiples of 512"):
        image.write(y0, np.zeros((3, n, WIDTH), np.uint8))


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_lost_chunk_is_an_error_not_black(tmp_path: Path, harm: str):
    image = image_of(tmp_path / "i")
    path = tmp_path / "i" / "0" / "c" / "0" / "1" / "1"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {"flip": lambda: path.write_bytes(data), "cut": lambda: path.write_bytes(data[:99]), "delete": path.unlink}[harm]()
    image.read(0, 512)
    with pytest.raises(CanvasError, match=r"c/0/1/1 of level 0 is (missing|damaged)"):
        image.read(600, 700, 600, 700)


@pytest.mark.parametrize("harm", ["absent", "garbled", "foreign"])
def test_what_is_not_a_picture_is_refused(tmp_path: Path, harm: str):
    if harm == "garbled":
        image_of(tmp_path / "i")
        (tmp_path / "i" / "zarr.json").write_text("{")
    if harm == "foreign":
        zarr.open_group(str(tmp_path / "i"), mode="w")
    with pytest.raises(CanvasError, match="must be an OME-Zarr picture"):
        Image.open(tmp_path / "i")


def test_full_disk_while_decoding_and_in_the_pyramid(tmp_path: Path):
    image = Image.create(tmp_path / "i", HEIGHT, WIDTH, 0.5, "test", {})
    with full_disk(20_000), pytest.raises(CanvasError, match=r"rows 0\.\.1024, cannot be written"):
        list(image.fill([PIXELS]))
    assert list(image.fill([PIXELS])) == [1024, HEIGHT]
    with full_disk(20_000), pytest.raises(CanvasError, match="pyramid"):
        image.build_pyramid()
    again = Image.open(tmp_path / "i")
    assert again.sizes == [(HEIGHT, WIDTH)]
    again.build_pyramid()
    assert len(again.sizes) == 3
