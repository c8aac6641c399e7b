"""Deep Zoom: libvips lays the same picture out in the same files, and large_image reads ours."""

import json
from pathlib import Path

import large_image_source_deepzoom
import numpy as np
import PIL.Image
import pytest
import pyvips

from engine.core.errors import CanvasError
from engine.images.dzi import write_dzi
from engine.images.ome_zarr import Image
from tests.support.known_picture import HEIGHT, PIXELS, WIDTH, full_disk


def tiles(folder: Path) -> dict[str, np.ndarray]:
    return {str(p.relative_to(folder)): np.asarray(PIL.Image.open(p)) for p in folder.rglob("*.png")}


def test_files_are_those_of_vips(image: Image, tmp_path: Path):
    write_dzi(tmp_path / "ours.dzi", image, "deflate")
    pyvips.Image.new_from_array(PIXELS.transpose(1, 2, 0)).dzsave(
        str(tmp_path / "theirs"), suffix=".png", tile_size=254, overlap=1, depth="onepixel"
    )
    ours, theirs = tiles(tmp_path / "ours_files"), tiles(tmp_path / "theirs_files")
    assert ours.keys() == theirs.keys()
    for name, seen in ours.items():
        assert seen.shape == theirs[name].shape
        if name.startswith("11/"):
            np.testing.assert_array_equal(seen, theirs[name])
    said = json.loads((tmp_path / "ours_files" / "provenance.json").read_text())
    assert (said["synthetic"], said["mpp_um"], said["digest"]) == (True, 0.5, "ab12")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # large_image leaves them open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_opens_in_large_image_with_the_same_pixels(image: Image, tmp_path: Path):
    write_dzi(tmp_path / "a.dzi", image, "deflate")
    source = large_image_source_deepzoom.open(str(tmp_path / "a.dzi"))
    assert (source.sizeX, source.sizeY) == (WIDTH, HEIGHT)
    assert source.levels == 4  # it counts from the first level of more than one tile
    for level, (h, w) in enumerate(image.sizes):
        seen = np.zeros((h, w, 3), np.uint8)
        for y in range(0, h, 254):
            for x in range(0, w, 254):
                tile = np.asarray(source.getTile(x // 254, y // 254, 3 - level, numpyAllowed="always"))
                seen[y : y + 254, x : x + 254] = tile[: h - y, : w - x, :3]
        np.testing.assert_array_equal(seen.transpose(2, 0, 1), image.read(0, h, level=level))


def test_jpeg_tiles_keep_the_colours(image: Image, tmp_path: Path):
    write_dzi(tmp_path / "a.dzi", image, jpeg_quality=95)
    with PIL.Image.open(tmp_path / "a_files" / "11" / "1_2.jpeg") as tile:
        expected = PIXELS[:, 507:763, 253:509]
        assert np.abs(np.asarray(tile).transpose(2, 0, 1).astype(int) - expected).mean() < 2


def test_bad_names_and_foreign_folders_are_left_alone(image: Image, tmp_path: Path):
    with pytest.raises(ValueError, match=r"must end in \.dzi"):
        write_dzi(tmp_path / "a.xml", image)
    (tmp_path / "a_files").mkdir()
    (tmp_path / "a_files" / "thesis.txt").write_text("mine")
    with pytest.raises(CanvasError, match="a_files must be free"):
        write_dzi(tmp_path / "a.dzi", image)
    assert [p.name for p in tmp_path.rglob("*")] == ["a_files", "thesis.txt"]


def test_full_disk_keeps_the_previous_pyramid(image: Image, tmp_path: Path):
    write_dzi(tmp_path / "a.dzi", image, jpeg_quality=20)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with full_disk(3000), pytest.raises(CanvasError, match="a_files cannot be written"):
        write_dzi(tmp_path / "a.dzi", image, "deflate")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    write_dzi(tmp_path / "a.dzi", image, "deflate")
    assert not list(tmp_path.rglob("*.jpeg"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.dzi", "a_files"]
