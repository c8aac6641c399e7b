"""Nodata, mask pages and alpha decide which px are valid; a band that is called alpha does not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from engine.core.errors import SlideError
from engine.slides.slide import Region, Slide, open_slide
from engine.slides.tissue import TissueConfig, find_tissue
from tests.support.written_slides import overwrite, ruler

H, W = 800, 1000
KEPT = np.zeros((H, W), bool)
KEPT[100:, 300:900] = True
"""Where there is a picture; around it lies a collar."""
BAND = np.random.default_rng(0).integers(0, 256, (H, W)).astype(np.uint8)


def picture(collar: int | Sequence[int] = 0) -> np.ndarray:
    """Return tissue (H, W, 3) without a px of pure black or white, in a collar of one colour."""
    pixels = np.clip(ruler(0.5, 500, 400), 3, 250)
    pixels[~KEPT] = collar
    return pixels


def write(path: Path, pixels: np.ndarray, **more: Any) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            pixels, **{"photometric": "rgb", "tile": (256, 256), "compression": "deflate", "metadata": None, **more}
        )
    return path


def text(code: int, value: str) -> tuple[Any, ...]:
    return code, "s", 0, value, True


def gdal(item: str, value: str) -> str:
    return f"<GDALMetadata><Item name='{item}'>{value}</Item></GDALMetadata>"


def make_mask(path: Path, index: int) -> None:
    """Say of a page that it is a mask; tifffile writes masks of one bit alone."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        page: Any = tiff.pages[index]
        page.tags["NewSubfileType"].overwrite(4)


def read(path: Path, mpp: float = 0.5) -> tuple[Region, str]:
    """Return the whole slide, said to have 0.5 µm/px, and its reader."""
    with open_slide(path, mpp=0.5) as slide:
        return slide.read(0, 0, round(W * 0.5 / mpp), round(H * 0.5 / mpp), mpp), slide.reader


def assert_kept(region: Region, kept: np.ndarray = KEPT, colours: np.ndarray | None = None) -> None:
    """Valid is where a picture is, with its colours; elsewhere px are white, as what was never written."""
    assert np.array_equal(region.valid, kept)
    assert np.array_equal(region.pixels[kept], (picture() if colours is None else colours)[kept])
    assert (region.pixels[~kept] == 255).all()
    assert region.damaged == 0


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    ("tags", "collar", "said"),
    [
        ([text(42113, "0")], 0, "nodata 0 0 0"),
        ([text(42113, "255")], 255, "nodata 255 255 255"),
        ([text(42113, " 17.0 ")], 17, "nodata 17 17 17"),
        (
            [text(42112, "<GDALMetadata><Item name='NODATA_VALUES'>9 8 7</Item></GDALMetadata>")],
            (9, 8, 7),
            "nodata 9 8 7",
        ),
        ([text(42113, "-9999")], 0, ""),  # no px of 8 bits has it
        ([text(42113, "nan")], 0, ""),
        ([text(42112, gdal("AREA_OR_POINT", "Area"))], 0, ""),
        ([], 0, ""),
    ],
)
def test_nodata(tmp_path: Path, tags: list[Any], collar: Any, said: str, planar: bool) -> None:
    pixels = picture(collar)
    shape, more = (pixels.transpose(2, 0, 1), {"planarconfig": "separate"}) if planar else (pixels, {})
    region, reader = read(write(tmp_path / "a.tif", shape, extratags=tags, **more))
    assert reader == f"tifffile, {said}" if said else reader == "tifffile"
    if said:
        assert_kept(region)
    else:
        assert region.valid.all()
        assert np.array_equal(region.pixels, pixels)


def test_one_dark_colour_is_no_nodata(tmp_path: Path) -> None:
    """Nodata is a px all of whose colours have the value: a pure red one is none."""
    pixels = np.full((H, W, 3), (200, 0, 0), np.uint8)
    assert read(write(tmp_path / "a.tif", pixels, extratags=[text(42113, "0")]))[0].valid.all()


def test_nodata_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"a: GDAL's nodata .* must be numbers; it is 'none none none'\. Set it anew"):
        open_slide(write(tmp_path / "a.tif", picture(), extratags=[text(42113, "none")]), mpp=0.5)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("where", ["behind", "before", "smaller", "larger", "beside"])
def test_mask_pages(tmp_path: Path, where: str, bits: int, planar: bool) -> None:
    """The collar is not black: the mask alone tells it. Masks of other sizes lie on whole px here."""
    pixels, mask = ruler(0.5, 500, 400), KEPT
    mask = {"smaller": mask[::4, ::4], "larger": mask.repeat(2, 0).repeat(2, 1)}.get(where, mask)
    mask = mask if bits == 1 else mask.astype(np.uint8) * np.uint8(255)
    page: dict[str, Any] = {"compression": "deflate", "metadata": None}
    page |= {"photometric": "mask", "subfiletype": 4} if bits == 1 else {"photometric": "minisblack", "subfiletype": 2}
    shape = pixels.transpose(2, 0, 1) if planar else pixels
    colours: dict[str, Any] = {"photometric": "rgb", "tile": (256, 256), "compression": "deflate", "metadata": None}
    colours |= {"planarconfig": "separate"} if planar else {}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        if where == "before":
            tiff.write(mask, tile=(128, 128), **page)
        tiff.write(shape, **colours)
        if where not in ("before", "beside"):
            tiff.write(mask, rowsperstrip=50, **page)
    if bits == 8 and where != "beside":
        make_mask(tmp_path / "a.tif", 0 if where == "before" else 1)
    if where == "beside":
        tifffile.imwrite(tmp_path / "a.tif.msk", mask, photometric="minisblack", tile=(128, 128), metadata=None)
    region, reader = read(tmp_path / "a.tif")
    assert reader == "tifffile, mask"
    assert_kept(region, colours=pixels)


@pytest.mark.parametrize("own", [True, False])
def test_a_level_has_its_own_mask_or_follows_the_whole_one(tmp_path: Path, own: bool) -> None:
    pixels, page = ruler(0.5, 500, 400), {"tile": (256, 256), "compression": "deflate", "metadata": None}
    other = KEPT[::4, ::4].copy()
    other[150:] = False  # differs, so that it is seen which one is read
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(pixels, photometric="rgb", **page)
        tiff.write(KEPT, photometric="mask", subfiletype=4, **page)
        tiff.write(pixels[::4, ::4], photometric="rgb", subfiletype=1, **page)
        if own:
            tiff.write(other, photometric="mask", subfiletype=5, **page)
    region, _ = read(tmp_path / "a.tif", mpp=2.0)
    assert np.array_equal(region.valid, other if own else KEPT[::4, ::4])
    assert_kept(read(tmp_path / "a.tif")[0], colours=pixels)


def test_a_px_of_a_level_needs_all_that_lies_under_it(tmp_path: Path) -> None:
    mask = np.ones((H, W), bool)
    mask[401, 602] = False
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for pixels, kind in ((ruler(0.5, 500, 400), 0), (ruler(2.0, 500, 400), 1)):
            tiff.write(pixels, photometric="rgb", subfiletype=kind, tile=(256, 256), metadata=None)
        tiff.write(mask, photometric="mask", subfiletype=4, metadata=None)
    region, _ = read(tmp_path / "a.tif", mpp=2.0)
    assert np.argwhere(~region.valid).tolist() == [[100, 150]]


def test_a_broken_mask_is_damage(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(ruler(0.5, 500, 400), photometric="rgb", tile=(256, 256), metadata=None)
        tiff.write(KEPT, photometric="mask", subfiletype=4, tile=(256, 256), compression="deflate", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page: Any = tiff.pages[1]
        offset, count = page.dataoffsets[6], page.databytecounts[6]  # the tile over y 256, x 512
    overwrite(tmp_path / "a.tif", offset, b"\xff" * count)
    region, _ = read(tmp_path / "a.tif")
    assert region.damaged == 1
    assert (region.pixels[256:512, 512:768] == 128).all()
    kept = KEPT.copy()
    kept[256:512, 512:768] = False
    assert np.array_equal(region.valid, kept)


@pytest.mark.parametrize("wrong", ["bits", "shape"])
def test_a_mask_that_is_none_is_refused(tmp_path: Path, wrong: str) -> None:
    mask = KEPT.astype(np.uint16) if wrong == "bits" else KEPT[:100]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(picture(), photometric="rgb", tile=(256, 256), metadata=None)
        tiff.write(mask, photometric="minisblack", subfiletype=2, metadata=None)
    make_mask(tmp_path / "a.tif", 1)
    with pytest.raises(SlideError, match=r"a: a mask must have one sample of 1 or 8 bits.*Write it anew") as caught:
        open_slide(tmp_path / "a.tif", mpp=0.5)
    assert caught.value.code == "unsupported"


def with_samples(*more: np.ndarray) -> np.ndarray:
    return np.concatenate([picture(), *(m[..., None].astype(np.uint8) for m in more)], axis=2)


ALPHA = KEPT * np.uint8(255)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    ("more", "kinds", "kept", "said"),
    [
        ((ALPHA,), ["unassalpha"], KEPT, ""),
        ((ALPHA,), ["assocalpha"], KEPT, ""),
        ((BAND,), ["unspecified"], None, ", 1 more band(s) left out"),
        ((ALPHA,), ["unspecified"], None, ", 1 more band(s) left out"),  # it is not called alpha
        ((BAND,), ["unassalpha"], None, ", 1 more band(s) left out"),  # called so, but it is near infrared
        ((BAND,), ["assocalpha"], None, ", 1 more band(s) left out"),
        ((np.full((H, W), 120),), ["unassalpha"], KEPT | True, ""),  # half transparent, but a picture everywhere
        ((BAND, ALPHA), ["unspecified", "unassalpha"], KEPT, ", 1 more band(s) left out"),
        ((ALPHA, BAND), ["unassalpha", "unspecified"], KEPT, ", 1 more band(s) left out"),
        ((BAND, BAND), ["unspecified", "unspecified"], None, ", 2 more band(s) left out"),
    ],
)
def test_alpha_and_bands(
    tmp_path: Path, more: tuple[np.ndarray, ...], kinds: list[str], kept: np.ndarray | None, said: str, planar: bool
) -> None:
    pixels = with_samples(*more)
    shape, config = (pixels.transpose(2, 0, 1), "separate") if planar else (pixels, "contig")
    region, reader = read(write(tmp_path / "a.tif", shape, planarconfig=config, extrasamples=kinds))
    assert reader == f"tifffile{said}"
    kept = KEPT | True if kept is None else kept
    assert np.array_equal(region.valid, kept)
    assert np.array_equal(region.pixels[kept], picture()[kept])


def test_colours_that_are_stored_multiplied_by_alpha(tmp_path: Path) -> None:
    """A soft rim: the colours are divided again, and what is too faint to be divided is not valid."""
    colours, alpha = ruler(0.5, 500, 400), np.full((H, W), 255, np.uint8)
    alpha[:, 500:540], alpha[:, 540:580], alpha[:, 580:] = 200, 60, 0
    stored = np.rint(colours * (alpha[..., None] / 255)).astype(np.uint8)
    path = write(tmp_path / "a.tif", np.concatenate([stored, alpha[..., None]], 2), extrasamples=["assocalpha"])
    region, _ = read(path)
    assert np.array_equal(region.valid, alpha >= 128)
    assert np.abs(region.pixels.astype(int) - colours)[region.valid].max() <= 1


def test_a_transparent_colour_of_a_png(tmp_path: Path) -> None:
    Pillow.fromarray(picture((1, 2, 3))).save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert_kept(read(tmp_path / "a.png")[0])


def test_planes_that_were_never_written_are_invalid(tmp_path: Path) -> None:
    """A tile that lacks one of its planes has no colour."""
    tiles = iter([*(np.full((256, 256), v, np.uint8) for v in (10, 20)), None, np.full((256, 256), 30, np.uint8),
                  *(np.full((256, 256), v, np.uint8) for v in (40, 50))])  # fmt: skip
    tifffile.imwrite(tmp_path / "a.tif", tiles, shape=(3, 256, 512), dtype=np.uint8, tile=(256, 256), metadata=None,
                     planarconfig="separate", photometric="rgb", compression="deflate")  # fmt: skip
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        region = slide.read(0, 0, 512, 256, 0.5)
    assert not region.valid[:, :256].any()
    assert (region.pixels[:, 256:] == (20, 30, 50)).all()
    assert region.valid[:, 256:].all()


@pytest.mark.parametrize("method", ["stain", "everything"])
def test_a_collar_is_no_tissue(tmp_path: Path, method: Any) -> None:
    path = write(tmp_path / "a.tif", picture(), extratags=[text(42113, "0")])
    with open_slide(path, mpp=0.5) as slide:
        mask = find_tissue(slide, TissueConfig(method))
        assert float(mask.share(np.array(0.0), np.array(0.0), 300, 800)) < 0.01
        assert float(mask.share(np.array(300.0), np.array(100.0), 600, 700)) > (0.9 if method == "everything" else 0.3)
        assert isinstance(slide, Slide)


@pytest.mark.parametrize("kind", ["planes", "mask"])
def test_one_huge_strip_is_refused_in_planes_and_in_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pixels = picture() if kind == "mask" else picture().transpose(2, 0, 1)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(pixels, photometric="rgb", planarconfig="contig" if kind == "mask" else "separate",
                   rowsperstrip=10 if kind == "mask" else H, metadata=None)  # fmt: skip
        if kind == "mask":
            tiff.write(KEPT, photometric="mask", subfiletype=4, rowsperstrip=H, metadata=None)
    open_slide(tmp_path / "a.tif", mpp=0.5).close()
    monkeypatch.setattr("engine.slides.backends.base.MAX_SEGMENT_PX", 100_000)
    with pytest.raises(SlideError, match=r"at most 100000 px; one has 1000x800") as caught:
        open_slide(tmp_path / "a.tif", mpp=0.5)
    assert caught.value.code == "unsupported"
