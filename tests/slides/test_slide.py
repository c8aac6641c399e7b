"""A window covers exactly the field asked for, whoever reads the file and whatever its levels are like."""

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from engine.core.errors import EngineError, SlideError
from engine.images.ome_zarr import Image
from engine.images.ome_zarr_export import write_ngff
from engine.slides.backends.base import level_scale, plausible_levels
from engine.slides.backends.openslide import VendorLevels
from engine.slides.slide import OpenSlides, Slide, find_slides, open_slide, slide_name
from tests.support.written_slides import bar_centres_um, box, ruler, stretched, write_tiff

FINE, COARSE = 0.5, 2.0
MARGIN_ROW_UM = 30.0


def small(mpp: float = 0.5) -> np.ndarray:
    return ruler(mpp, 300, 260)


def pyramid(picture: np.ndarray, kind: str) -> list[np.ndarray]:
    if kind == "flat":
        return [picture]
    if kind == "3.998":
        return [picture, stretched(picture, 3.998), stretched(picture, 15.97)]
    odd = picture[: picture.shape[0] - 3, : picture.shape[1] - 5]
    return [odd, box(odd, 2, kind), box(odd, 4, kind), box(odd, 16, kind)]


@pytest.mark.parametrize("kind", ["flat", "up", "down", "3.998"])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.29])
def test_a_printed_ruler_is_found_within_one_px_at_20x(tmp_path: Path, mpp: float, kind: str) -> None:
    path = write_tiff(tmp_path / "a.tif", pyramid(ruler(mpp), kind), mpp)
    with open_slide(path) as slide:
        # A stretched level whose size could also be a rounded whole factor is ambiguous by up to one of its px.
        most = {FINE: FINE, COARSE: FINE if kind != "3.998" else mpp * slide.scales[slide.level_for(COARSE)][0]}
        for at, size, where_um in ((FINE, 400, 37.3), (FINE, 900, 601.0), (COARSE, 256, 11.9), (COARSE, 256, 400.0)):
            start = where_um / mpp
            across = slide.read(start, MARGIN_ROW_UM / mpp, size, 1, at).pixels[0, :, 1]
            down = slide.read(MARGIN_ROW_UM / mpp, start, 1, size, at).pixels[:, 0, 1]
            errors = bar_centres_um(across, at, where_um)
            assert len(errors) >= 1
            assert np.abs(errors).max() <= most[at], (at, where_um, errors)  # ±1 px at 20x
            errors = bar_centres_um(down[: int((690 - where_um) / at)], at, where_um)
            assert np.abs(errors).max(initial=0) <= most[at], (at, where_um, errors)


def test_that_test_can_fail(tmp_path: Path) -> None:
    """The field of a peer that truncates 3.998 to 3 is a third too wide."""
    path = write_tiff(tmp_path / "a.tif", pyramid(ruler(0.25), "3.998"), 0.25)
    with open_slide(path) as slide:
        wide = slide.read(0, MARGIN_ROW_UM / 0.25, 256, 1, COARSE * 3.998 / 3, level=1).pixels[0, :, 1]
    assert np.abs(bar_centres_um(wide[:200], COARSE, 0)).max() > FINE


def test_level_scales_are_whole_where_rounding_explains_them() -> None:
    assert level_scale((10001, 9999), (2501, 2500)) == (4, 4)
    assert level_scale((10001, 9999), (2500, 2499)) == (4, 4)
    assert level_scale((10000, 10000), (2501, 2501)) == pytest.approx((3.9984, 3.9984))
    assert level_scale((1000, 1000), (1000, 1000)) == (1, 1)


def test_labels_and_thumbnails_are_no_levels() -> None:
    assert plausible_levels([(4000, 6000), (1000, 1500), (1024, 1024), (250, 375), (250, 375), (2, 3)]) == [0, 1, 3]


def test_neighbouring_windows_make_the_large_one(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [ruler(0.29, 600, 300)], 0.29)
    with open_slide(path) as slide:
        whole = slide.read(100, 50, 512, 256, FINE).pixels
        width = slide.field(256, FINE)[0]
        parts = [slide.read(100 + i * width, 50, 256, 256, FINE).pixels for i in range(2)]
    assert np.abs(np.concatenate(parts, axis=1).astype(int) - whole).max() <= 1


def test_whole_factors_are_means_and_the_level_does_not_matter(tmp_path: Path) -> None:
    picture = small(0.25)
    path = write_tiff(tmp_path / "a.tif", [picture, box(picture, 2), box(picture, 4)], 0.25)
    with open_slide(path) as slide:
        assert [slide.level_for(m) for m in (0.1, 0.25, 0.5, 0.995, 1.0, 8.0)] == [0, 0, 1, 2, 2, 2]
        direct = slide.read(64, 128, 100, 90, 1.0).pixels
        assert np.array_equal(direct, box(picture, 4)[32:122, 16:116])
        from_full = slide.read(64, 128, 100, 90, 1.0, level=0).pixels
        assert np.abs(direct.astype(int) - from_full).max() <= 1


def test_x_and_y_have_their_own_scale(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [small()], None)
    with open_slide(path, {"a": (0.5, 1.0)}) as slide:
        assert slide.field(256, FINE) == (256, 128)
        region = slide.read(10, 20, 64, 64, 1.0)
        expected = small()[20:84, 10:138].reshape(64, 64, 2, 3).mean(2)
        assert np.abs(region.pixels - expected).max() <= 0.5


def test_beyond_the_slide_is_white_and_invalid(tmp_path: Path) -> None:
    picture = small()
    path = write_tiff(tmp_path / "a.tif", [picture], 0.5)
    h, w = picture.shape[:2]
    with open_slide(path) as slide:
        for mpp in (0.5, 0.7, 2.0):
            region = slide.read(w - 100, h - 100, 200, 200, mpp)
            px = int(100 * 0.5 / mpp)
            assert region.valid[: px - 1, : px - 1].all()
            assert not region.valid[px + 1 :].any()
            assert not region.valid[:, px + 1 :].any()
            assert (region.pixels[px + 2 :] == 255).all()
            assert region.damaged == 0
        assert not slide.read(-500, 0, 100, 100, 0.5).valid.any()
        assert not slide.read(w + 500, h + 90, 100, 100, 0.3).valid.any()
        with pytest.raises(ValueError, match="at least 1x1"):
            slide.read(0, 0, 0, 5, 0.5)


def make_picture(kind: str, folder: Path, picture: np.ndarray) -> Path:
    """Write the same px in one of the formats; mpp 0.5 where the format can say so."""
    if kind == "ome.zarr":
        rows = [picture.transpose(2, 0, 1)]
        Image.of_rows(folder / "a.ome.zarr", rows, picture.shape[:2], 0.5, "a", {})
        return folder / "a.ome.zarr"
    if kind == "0.4.ome.zarr":
        made = Image.of_rows(folder / "made", [picture.transpose(2, 0, 1)], picture.shape[:2], 0.5, "a", {})
        write_ngff(folder / "a.ome.zarr", made, "0.4")
        return folder / "a.ome.zarr"
    if kind in ("ome.tif", "planes.ome.tif"):
        planes = kind.startswith("planes")
        more = {"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 500, "PhysicalSizeYUnit": "nm"}
        pixels, axes = (picture.transpose(2, 0, 1), "CYX") if planes else (picture, "YXS")
        with tifffile.TiffWriter(folder / "a.ome.tif") as tiff:
            tiff.write(
                pixels, tile=(256, 256), metadata={"axes": axes, **more}, photometric="minisblack" if planes else "rgb"
            )
        return folder / "a.ome.tif"
    if kind == "strips.tif":
        tifffile.imwrite(folder / "a.tif", picture, rowsperstrip=37, compression="lzw", metadata=None)
        return folder / "a.tif"
    path = folder / f"a.{kind}"
    Pillow.fromarray(picture).save(path, **({"quality": 100, "subsampling": 0} if kind == "jpg" else {}))
    return path


@pytest.mark.parametrize(
    ("kind", "reader", "source"),
    [
        ("ome.zarr", "zarr", "OME-NGFF scale"),
        ("0.4.ome.zarr", "zarr", "OME-NGFF scale"),
        ("ome.tif", "tifffile", "OME-XML PhysicalSize"),
        ("planes.ome.tif", "tifffile", "OME-XML PhysicalSize"),
        ("strips.tif", "tifffile", "given"),
        ("png", "picture", "given"),
        ("jpg", "picture", "given"),
    ],
)
def test_every_format_gives_the_same_px(tmp_path: Path, kind: str, reader: str, source: str) -> None:
    picture = small()
    path = make_picture(kind, tmp_path, picture)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.name, slide.reader) == ("a", reader)
        assert slide.resolution.source.startswith(source)
        assert (slide.resolution.mpp_x, slide.resolution.mpp_y) == pytest.approx((0.5, 0.5))
        assert (slide.height, slide.width) == picture.shape[:2]
        region = slide.read(123, 45, 300, 400, 0.5)
        assert region.valid.all()
        difference = np.abs(region.pixels.astype(int) - picture[45:445, 123:423])
        assert difference.mean() <= (2 if kind == "jpg" else 0)
        half = slide.read(100, 60, 100, 90, 1.0).pixels
        assert np.abs(half.astype(int) - box(picture[60:240, 100:300], 2)).mean() <= (2 if kind == "jpg" else 0.3)


def test_a_pyramid_of_planes(tmp_path: Path) -> None:
    picture = small()
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        options = {"tile": (128, 128), "photometric": "rgb", "planarconfig": "separate"}
        tiff.write(picture.transpose(2, 0, 1), subifds=1, metadata={"axes": "CYX"}, **options)
        tiff.write(box(picture, 4).transpose(2, 0, 1), subfiletype=1, metadata=None, **options)
    with open_slide(tmp_path / "a.ome.tif", mpp=0.5) as slide:
        assert [size[0] for size in slide.sizes] == [520, 130]
        assert np.array_equal(slide.read(40, 80, 64, 64, 2.0).pixels, box(picture, 4)[20:84, 10:74])
        assert np.array_equal(slide.read(40, 80, 64, 64, 0.5).pixels, picture[80:144, 40:104])


def test_openslide_reads_the_same(tmp_path: Path) -> None:
    picture = ruler(0.29)
    path = write_tiff(tmp_path / "a.tif", [picture, box(picture, 4)], 0.29, "jpeg")
    ours = open_slide(path)
    theirs = Slide("a", path, VendorLevels(path, "a"), ours.resolution)
    assert theirs.sizes == ours.sizes
    assert VendorLevels(path, "a").claims.mpp[0].mpp_x == pytest.approx(0.29)
    for x, y, mpp in ((256, 512, 0.29), (700.5, 300.25, 0.5), (8, 16, 2.0)):
        a, b = (s.read(x, y, 200, 150, mpp) for s in (ours, theirs))
        assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 1
        assert b.valid.all()
    theirs.close()
    theirs.close()


@pytest.mark.parametrize(("subsampling", "rgb"), [((1, 1), False), ((2, 2), False), ((1, 1), True)])
def test_jpeg_colours_are_those_of_tifffile(tmp_path: Path, subsampling: tuple[int, int], rgb: bool) -> None:
    """Px stored as YCbCr or, with tables of their own or shared, as RGB."""
    picture = small()
    path = tmp_path / "a.svs"
    arguments = {"level": 95, "outcolorspace": "RGB"} if rgb else {"level": 95}
    tifffile.imwrite(path, picture, tile=(240, 240), photometric="rgb", compression="jpeg", metadata=None,
                     subsampling=subsampling, compressionargs=arguments,
                     description="Aperio Image Library\n600x520|AppMag = 39.9|MPP = 0.2513")  # fmt: skip
    with open_slide(path) as slide:
        assert (slide.objective, slide.resolution.source, slide.resolution.mpp_x) == (39.9, "aperio.MPP", 0.2513)
        got = slide.read(0, 0, slide.width, slide.height, 0.2513).pixels
    assert np.array_equal(got, tifffile.imread(path))


def test_threads_share_a_slide_and_processes_a_path(tmp_path: Path) -> None:
    picture = ruler(0.5)
    paths = [write_tiff(tmp_path / f"{n}.tif", [picture], 0.5, "jpeg") for n in "abc"]
    slides = OpenSlides(limit=2)
    first = slides.get(paths[0])
    expected = [first.read(i * 97, i * 31, 256, 256, 0.5).pixels for i in range(12)]
    wrong: list[int] = []

    def look() -> None:
        for i in range(12):
            got = [slides.get(path).read(i * 97, i * 31, 256, 256, 0.5).pixels for path in paths]
            wrong.extend(i for pixels in got if not np.array_equal(pixels, expected[i]))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert np.array_equal(first.read(0, 0, 256, 256, 0.5).pixels, expected[0])  # dropped, yet still open for us


def test_find_slides(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="must hold slides"):
        find_slides(tmp_path)
    with pytest.raises(EngineError, match="must be a folder"):
        find_slides(tmp_path / "none")
    for name in ("b.SVS", "deep/a.ome.tiff", "c.txt", ".hidden.svs", "x.zarr/0/inner.tif", "d.mrxs", "d/Data0.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "circle").symlink_to(tmp_path)
    assert [p.name for p in find_slides(tmp_path)] == ["a.ome.tiff", "b.SVS", "d.mrxs", "x.zarr"]


@pytest.mark.parametrize(
    ("file", "name"),
    [("a.svs", "a"), ("a.b.ome.tif", "a.b"), ("TCGA-1.0.NDPI", "TCGA-1.0"), ("p.ome.zarr", "p"), (".svs", ".svs")],
)
def test_slide_name(file: str, name: str) -> None:
    assert slide_name(Path(file)) == name


def test_slide_error_travels() -> None:
    error = pickle.loads(pickle.dumps(SlideError("truncated", "why")))
    assert (error.code, str(error)) == ("truncated", "why")
