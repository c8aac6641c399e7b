"""OME-Zarr 0.4 and 0.5: ome-zarr and the specification's models read pixels, levels and scale."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from ome_zarr_models.v04.image import ImageAttrs as Attributes04
from ome_zarr_models.v05.image import ImageAttrs as Attributes05

from engine.core.errors import CanvasError
from engine.images.ome_zarr import Image
from engine.images.ome_zarr_export import Version, write_ngff
from engine.images.pyramid import FromLevel
from tests.support.known_picture import PROVENANCE, full_disk


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_opens_in_ome_zarr_with_the_same_pixels(image: Image, tmp_path: Path, version: Version):
    write_ngff(tmp_path / "a.ome.zarr", image, version)
    location = parse_url(tmp_path / "a.ome.zarr")
    assert location is not None
    assert location.fmt.version == version
    (node,) = list(Reader(location)())
    assert [level.shape[1:] for level in node.data] == image.sizes
    for level, seen in enumerate(node.data):
        np.testing.assert_array_equal(np.asarray(seen), image.read(0, image.sizes[level][0], level=level))
    assert [a["name"] for a in node.metadata["axes"]] == ["c", "y", "x"]
    scales = [t[0]["scale"] for t in node.metadata["coordinateTransformations"]]
    assert scales == [[1, 0.5, 0.5], [1, 1, 1], [1, 2, 2]]


@pytest.mark.parametrize(("version", "model"), [("0.4", Attributes04), ("0.5", Attributes05)])
def test_metadata_is_valid_and_says_synthetic(image: Image, tmp_path: Path, version: Version, model: type):
    write_ngff(tmp_path / "a.ome.zarr", image, version)
    group = zarr.open_group(str(tmp_path / "a.ome.zarr"), mode="r")
    attributes = group.attrs.asdict()
    model.model_validate(attributes if version == "0.4" else attributes["ome"])  # type: ignore[attr-defined]
    assert group.attrs["zoomldm_engine"] == {"synthetic": True, **PROVENANCE}


def test_04_is_zarr_2_that_java_reads(image: Image, tmp_path: Path):
    write_ngff(tmp_path / "a.ome.zarr", image, "0.4")
    described = json.loads((tmp_path / "a.ome.zarr" / "1" / ".zarray").read_text())
    assert described["zarr_format"] == 2
    assert described["dimension_separator"] == "/"
    assert described["compressor"] == {"id": "zlib", "level": 6}
    assert described["filters"] is None
    assert (tmp_path / "a.ome.zarr" / "0" / "0" / "0" / "0").is_file()  # the black chunk too
    assert not list((tmp_path / "a.ome.zarr").rglob("zarr.json"))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_coarser_picture_has_its_own_scale(image: Image, tmp_path: Path, version: Version):
    write_ngff(tmp_path / "a.ome.zarr", FromLevel(image, 1), version)
    (node,) = list(Reader(parse_url(tmp_path / "a.ome.zarr"))())
    assert [level.shape[1:] for level in node.data] == image.sizes[1:]
    assert node.metadata["coordinateTransformations"][0][0]["scale"] == [1, 1, 1]
    for level, seen in enumerate(node.data, 1):
        np.testing.assert_array_equal(np.asarray(seen), image.read(0, image.sizes[level][0], level=level))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_full_disk_keeps_the_previous_folder(image: Image, tmp_path: Path, version: Version):
    path = tmp_path / "a.ome.zarr"
    write_ngff(path, image, version)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with full_disk(20_000), pytest.raises(CanvasError, match="cannot be written"):
        write_ngff(path, image, version)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    write_ngff(path, image, "0.4" if version == "0.5" else "0.5")
    assert [p.name for p in tmp_path.iterdir()] == ["a.ome.zarr"]
    assert (path / "zarr.json").exists() != (version == "0.5")


def test_a_folder_of_something_else_is_left_alone(image: Image, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CanvasError, match="must be free"):
        write_ngff(tmp_path, image)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
