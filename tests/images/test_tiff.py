"""TIFF pyramids: other people's readers see the same pixels, levels, scale and provenance."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openslide
import pytest
import pyvips
import tifffile

from engine.core.errors import CanvasError
from engine.images.ome_zarr import Image
from engine.images.pyramid import resolution
from engine.images.tiff import write_ome_tiff, write_tiff
from tests.support.known_picture import HEIGHT, PIXELS, PROVENANCE, WIDTH, full_disk, image_of

OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"


def test_tiff_opens_in_openslide_with_the_same_pixels(image: Image, tmp_path: Path):
    write_tiff(tmp_path / "a.tiff", image)
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert slide.level_dimensions == tuple((w, h) for h, w in image.sizes)
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        assert float(slide.properties["openslide.mpp-y"]) == 0.5
        assert json.loads(slide.properties["tiff.ImageDescription"]) == {
            "synthetic": True, "mpp_um": 0.5, **PROVENANCE}  # fmt: skip
        for level, (h, w) in enumerate(image.sizes):
            seen = np.asarray(slide.read_region((0, 0), level, (w, h)))[..., :3]
            np.testing.assert_array_equal(seen.transpose(2, 0, 1), image.read(0, h, level=level))


def test_tiff_opens_in_tifffile_as_one_pyramid(image: Image, tmp_path: Path):
    write_tiff(tmp_path / "a.tiff", image)
    with tifffile.TiffFile(tmp_path / "a.tiff") as tiff:
        assert tiff.is_bigtiff
        pages = [page.aspage() for page in tiff.pages]
        assert [page.subfiletype for page in pages] == [0, 1, 1]
        assert all(page.is_tiled for page in pages)
        assert len(tiff.series) == 1
        assert len(tiff.series[0].levels) == 3
        for level, seen in enumerate(tiff.series[0].levels):
            expected = image.read(0, image.sizes[level][0], level=level)
            np.testing.assert_array_equal(seen.asarray().transpose(2, 0, 1), expected)


def test_jpeg_tiff_keeps_the_colours(image: Image, tmp_path: Path):
    write_tiff(tmp_path / "a.tiff", image, "jpeg", 95)
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        seen = np.asarray(slide.read_region((0, 0), 0, (WIDTH, HEIGHT)))[..., :3].transpose(2, 0, 1)
    assert np.abs(seen.astype(int) - PIXELS).mean() < 2


@pytest.mark.parametrize("mpp_um", [1e6, 8e6, 0.5, 0.2527, 1 / 3, 1e-3])
def test_resolution_is_a_valid_rational(mpp_um: float):
    top, bottom = resolution(mpp_um)
    assert 0 < top < 2**32
    assert 0 < bottom < 2**32
    assert 10_000 * bottom / top == pytest.approx(mpp_um, rel=1e-6)


def test_satellite_tiff_has_its_scale(tmp_path: Path):
    write_tiff(tmp_path / "a.tiff", image_of(tmp_path / "i", mpp_um=1e6))
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert float(slide.properties["openslide.mpp-x"]) == 1e6


def test_full_disk_keeps_the_previous_export(image: Image, tmp_path: Path):
    write_tiff(tmp_path / "a.tiff", image)
    before = (tmp_path / "a.tiff").read_bytes()
    with full_disk(20_000), pytest.raises(CanvasError, match=r"a\.tiff cannot be written.*full.*MiB.*repeat"):
        write_tiff(tmp_path / "a.tiff", image)
    assert (tmp_path / "a.tiff").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tiff"]


def test_tiff_opens_in_vips_with_its_levels_and_scale(image: Image, tmp_path: Path):
    write_tiff(tmp_path / "a.tiff", image)
    for level, (h, w) in enumerate(image.sizes):
        seen = pyvips.Image.new_from_file(str(tmp_path / "a.tiff"), page=level)
        assert (seen.height, seen.width, seen.get("n-pages")) == (h, w, 3)
        assert seen.xres == pytest.approx(2000 / 2**level)  # px per mm
        np.testing.assert_array_equal(seen.numpy().transpose(2, 0, 1), image.read(0, h, level=level))


def test_ome_tiff_opens_in_tifffile_with_subifds_and_ome_xml(image: Image, tmp_path: Path):
    write_ome_tiff(tmp_path / "a.ome.tiff", image)
    with tifffile.TiffFile(tmp_path / "a.ome.tiff") as tiff:
        assert tiff.is_ome
        assert tiff.is_bigtiff
        assert len(tiff.pages) == 1
        (series,) = tiff.series
        assert series.axes == "YXS"
        assert [level.shape for level in series.levels] == [(h, w, 3) for h, w in image.sizes]
        for level, seen in enumerate(series.levels):
            page = seen.pages[0].aspage()
            assert page.is_tiled
            top, bottom = page.tags["XResolution"].value
            assert 10_000 * bottom / top == 0.5 * 2**level
            np.testing.assert_array_equal(
                seen.asarray().transpose(2, 0, 1), image.read(0, image.sizes[level][0], level=level)
            )
        root = ElementTree.fromstring(tiff.ome_metadata or "")
    pixels = root.find(f".//{OME}Pixels")
    assert pixels is not None
    said = {k: pixels.get(k) for k in ("SizeX", "SizeY", "SizeC", "PhysicalSizeX", "PhysicalSizeXUnit", "Type")}
    assert said == {"SizeX": "900", "SizeY": "1300", "SizeC": "3", "PhysicalSizeX": "0.5", "PhysicalSizeXUnit": "µm",
                    "Type": "uint8"}  # fmt: skip
    assert (pixels.get("PhysicalSizeY"), pixels.get("PhysicalSizeYUnit")) == ("0.5", "µm")
    pairs = {m.get("K"): m.text for m in root.iter(f"{OME}M")}
    assert pairs == {"synthetic": "true", "model": "demo", "digest": "ab12", "seed": "7", "mpp_um": "0.5"}
    description = root.find(f".//{OME}Image/{OME}Description")
    assert description is not None
    assert json.loads(description.text or "")["synthetic"] is True


def test_ome_tiff_opens_in_vips_and_openslide(image: Image, tmp_path: Path):
    write_ome_tiff(tmp_path / "a.ome.tiff", image)
    whole = pyvips.Image.new_from_file(str(tmp_path / "a.ome.tiff"))
    assert whole.get("n-subifds") == 2
    assert whole.xres == pytest.approx(2000)
    for level, (h, _) in enumerate(image.sizes):
        seen = pyvips.Image.new_from_file(str(tmp_path / "a.ome.tiff"), subifd=level - 1)
        np.testing.assert_array_equal(seen.numpy().transpose(2, 0, 1), image.read(0, h, level=level))
    with openslide.OpenSlide(tmp_path / "a.ome.tiff") as slide:  # sees the full resolution only
        assert slide.dimensions == (WIDTH, HEIGHT)
        assert float(slide.properties["openslide.mpp-x"]) == 0.5


def test_jpeg_ome_tiff_keeps_the_colours(image: Image, tmp_path: Path):
    write_ome_tiff(tmp_path / "a.ome.tiff", image, "jpeg", 95)
    seen = tifffile.imread(tmp_path / "a.ome.tiff").transpose(2, 0, 1)
    assert np.abs(seen.astype(int) - PIXELS).mean() < 2


def test_ome_tiff_written_twice_has_the_same_bytes(image: Image, tmp_path: Path):
    names = [tmp_path / part / "a.ome.tiff" for part in ("one", "two")]
    for name in names:
        name.parent.mkdir()
        write_ome_tiff(name, image)
    assert names[0].read_bytes() == names[1].read_bytes()


def test_full_disk_keeps_the_previous_ome_tiff(image: Image, tmp_path: Path):
    write_ome_tiff(tmp_path / "a.ome.tiff", image)
    before = (tmp_path / "a.ome.tiff").read_bytes()
    with full_disk(20_000), pytest.raises(CanvasError, match=r"a\.ome\.tiff cannot be written"):
        write_ome_tiff(tmp_path / "a.ome.tiff", image)
    assert (tmp_path / "a.ome.tiff").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ome.tiff"]
