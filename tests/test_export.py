"""The picture and its copies: other people's readers see the same pixels, levels and scale."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openslide
import PIL.Image
import pytest
import tifffile
import zarr

from engine.errors import CanvasError
from engine.export import check_png, resolution, write_picture, write_png, write_preview, write_tiff
from engine.image import CHUNK_PX, Image, halve

HEIGHT, WIDTH = 1300, 900
PROVENANCE = {"model": "demo", "digest": "ab12", "seed": 7}


def pixels_of(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth waves, and a black corner of a whole chunk, which zarr would not store by itself."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(y / 60 + k) * np.cos(x / (50 + 9 * k)) for k in range(3)]
    pixels = np.stack(waves).astype(np.uint8)
    pixels[:, :CHUNK_PX, :CHUNK_PX] = 0
    return pixels


PIXELS = pixels_of()


def image_of(path: Path, mpp_um: float = 0.5) -> Image:
    image = Image.create(path, HEIGHT, WIDTH, mpp_um, "test", PROVENANCE)
    for _ in image.fill(PIXELS[:, y : y + 100] for y in range(0, HEIGHT, 100)):
        pass
    image.build_pyramid()
    return image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return image_of(tmp_path_factory.mktemp("image") / "image.ome.zarr")


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let the kernel refuse files above a size, as a full disk or quota refuses them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def test_png_is_the_picture_and_says_synthetic(image: Image, tmp_path: Path):
    write_png(tmp_path / "a.png", image)
    with PIL.Image.open(tmp_path / "a.png") as png:
        np.testing.assert_array_equal(np.asarray(png).transpose(2, 0, 1), PIXELS)
        assert json.loads(png.info["provenance"])["synthetic"] is True


def test_png_of_a_whole_slide_is_refused():
    check_png(16384, 16384)
    with pytest.raises(ValueError, match=r"at most 16384 px.*output\.formats"):
        check_png(256, 16388)


def test_preview_shows_canvas_and_guide_at_one_height(image: Image, tmp_path: Path):
    guide = PIXELS.reshape(3, 65, 20, 45, 20).mean(axis=(2, 4)).astype(np.uint8)
    write_preview(tmp_path / "p.png", image, guide)
    with PIL.Image.open(tmp_path / "p.png") as png:
        assert png.size == (709 + 8 + 709, 1024)
        seen = np.asarray(png).astype(int)
    assert (seen[:, 709:717] == 255).all()
    small = np.asarray(PIL.Image.fromarray(PIXELS.transpose(1, 2, 0)).resize((709, 1024)))
    inside = (slice(450, 1000), slice(20, 690))  # away from the black corner, where kernels differ
    assert np.abs(seen[:, :709] - small)[inside].mean() < 3
    assert np.abs(seen[:, 717:] - small)[inside].mean() < 6
    write_preview(tmp_path / "q.png", image, None)
    with PIL.Image.open(tmp_path / "q.png") as png:
        assert png.size == (709, 1024)


def test_picture_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="uint8"):
        write_picture(tmp_path / "g.png", np.zeros((4, 4, 3), np.uint8), {})
