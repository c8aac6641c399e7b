"""Bad input is named by a reason code; damaged px are marked, and never come back as white."""

import os
import shutil
import tempfile
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from engine.core.errors import SlideError
from engine.images.ome_zarr import Image
from engine.slides.backends.openslide import VendorLevels
from engine.slides.slide import Slide, open_slide
from tests.support.written_slides import overwrite, ruler, tile_bytes, write_tiff


def small() -> np.ndarray:
    return ruler(0.5, 500, 400)


def refused(path: Path, mpp: float | None = 0.5) -> str:
    """Return the reason code; the message names the slide and what to do."""
    with pytest.raises(SlideError) as caught:
        open_slide(path, mpp=mpp)
    message = str(caught.value)
    assert path.name.partition(".")[0] in message
    assert message.endswith((".", "?", ")"))
    return caught.value.code


@pytest.mark.parametrize("name", ["a.svs", "a.tif", "a.png", "a.ndpi"])
def test_not_a_slide_and_zero_bytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    assert refused(path) == "empty_file"
    path.write_bytes(b"Dear colleague, please find the slide attached.\n" * 20)
    assert refused(path) == "not_a_slide"
    path.write_bytes(b"II*\0" + bytes(range(200)))
    assert refused(path) == "not_a_slide"
    path.unlink()
    assert refused(path) == "missing"
    path.mkdir()
    assert refused(path) == "not_a_slide"


@pytest.mark.parametrize("share", [0.3, 0.97, 0.999])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float, levels: int) -> None:
    picture = small()
    path = write_tiff(tmp_path / "a.svs", [picture, picture[::4, ::4]][:levels], 0.5, "jpeg")
    os.truncate(path, int(path.stat().st_size * share))
    assert refused(path) == "truncated"


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_damaged_picture_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    Pillow.fromarray(small()).save(path)
    open_slide(path, mpp=0.5).close()
    os.truncate(path, path.stat().st_size // 2)
    assert refused(path) == "damaged"


@pytest.mark.parametrize("kind", ["cut", "zeros", "noise", "header"])
def test_a_corrupt_jpeg_tile_is_masked_counted_and_never_white(tmp_path: Path, kind: str) -> None:
    picture = small()
    path = write_tiff(tmp_path / "a.svs", [picture, picture[::4, ::4]], 0.5, "jpeg")
    clean = open_slide(path).read(100, 100, 600, 600, 0.5)
    offset, count = tile_bytes(path, 300, 300)
    scan = offset + 700
    overwrite(path, *{
        "cut": (scan + 2000, b"\xff\xd9"),
        "zeros": (scan, bytes(count // 2)),
        "noise": (scan, np.random.default_rng(0).bytes(count // 2)),
        "header": (offset, bytes(64)),
    }[kind])  # fmt: skip
    with open_slide(path) as slide:
        region = slide.read(100, 100, 600, 600, 0.5)
        assert region.damaged == 1
        there = np.zeros((600, 600), bool)
        there[156:412, 156:412] = True  # the tile 256..512
        assert np.array_equal(region.valid, ~there)
        assert (region.pixels[there] == 128).all()
        assert np.array_equal(region.pixels[~there], clean.pixels[~there])
        at_10x = slide.read(100, 100, 300, 300, 1.0)
        assert not at_10x.valid[80:204, 80:204].any()
        assert at_10x.valid[:77].all()
        fraction = slide.read(100, 100, 400, 400, 0.61)
        assert 0.70 < fraction.valid.mean() < 0.73  # 1 - (256 / 488)², and a rim
        assert slide.read(600, 500, 200, 200, 0.5).damaged == 0


def test_tiles_that_were_never_written_are_invalid_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tile = small()[:256, :256]
    tifffile.imwrite(path, (t for t in [tile, None, tile, tile]), shape=(512, 512, 3), dtype=np.uint8, tile=(256, 256),
                     photometric="rgb", compression="deflate", metadata=None)  # fmt: skip
    with open_slide(path, mpp=0.5) as slide:
        region = slide.read(0, 0, 512, 512, 0.5)
    assert region.damaged == 0
    assert not region.valid[:256, 256:].any()
    assert region.valid.mean() == 0.75


def test_a_damaged_or_lost_chunk_of_ome_zarr(tmp_path: Path) -> None:
    picture = ruler(0.5, 600, 300)
    path = tmp_path / "a.ome.zarr"
    Image.of_rows(path, [picture.transpose(2, 0, 1)], picture.shape[:2], 0.5, "a", {})
    chunk = path / "0" / "c" / "0" / "0" / "0"
    overwrite(chunk, 3000, bytes(500))
    with open_slide(path) as slide:
        region = slide.read(0, 0, 1024, 512, 0.5)
        assert region.damaged == 1
        assert (region.pixels[:, :512] == 128).all()
        assert np.array_equal(region.valid, np.arange(1024)[None, :].repeat(512, 0) >= 512)
        chunk.unlink()
        region = slide.read(0, 0, 1024, 512, 0.5)
        assert (region.damaged, region.valid[:, :512].any()) == (0, False)
        shutil.rmtree(path)
        with pytest.raises(SlideError) as caught:
            slide.read(0, 0, 1024, 512, 0.5)
    assert caught.value.code == "vanished"


def test_openslide_survives_its_own_errors(tmp_path: Path) -> None:
    """One damaged tile poisons a handle for good; ours goes on, and marks that tile alone."""
    picture = small()
    path = write_tiff(tmp_path / "a.tif", [picture], 0.5, "jpeg")
    resolution = open_slide(path).resolution
    offset, _ = tile_bytes(path, 300, 300)
    overwrite(path, offset, bytes(64))
    with Slide("a", path, VendorLevels(path, "a"), resolution) as slide:
        for _ in range(2):
            region = slide.read(0, 0, 768, 768, 0.5)
            assert region.damaged == 1
            assert not region.valid[256:512, 256:512].any()
            assert region.valid.mean() == pytest.approx(1 - 1 / 9)
        assert slide.read(512, 0, 200, 200, 0.5).valid.all()
        path.unlink()
        with pytest.raises(SlideError) as caught:
            slide.read(300, 300, 200, 200, 0.5)
    assert caught.value.code == "vanished"


def test_a_slide_that_vanishes_stays_readable_while_open(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [small()], 0.5)
    with open_slide(path) as slide:
        before = slide.read(0, 0, 300, 300, 0.5).pixels
        path.unlink()
        assert np.array_equal(slide.read(0, 0, 300, 300, 0.5).pixels, before)
    assert refused(path) == "missing"


def test_a_slide_that_is_cut_off_while_open(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [small()], 0.5)
    with open_slide(path) as slide:
        os.truncate(path, 1000)
        with pytest.raises(SlideError) as caught:
            slide.read(512, 512, 100, 100, 0.5)
    assert caught.value.code == "vanished"


def test_unreadable_permission() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        Path(name).chmod(0o755)
        path = write_tiff(Path(name) / "a.tif", [small()], 0.5)
        open_slide(path).close()
        path.chmod(0)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)  # root reads everything
        try:
            assert refused(path) == "no_permission"
        finally:
            os.seteuid(me)


@pytest.mark.parametrize("kind", ["tif", "png", "jpg"])
def test_greyscale_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "tif":
        write_tiff(path, [small()[..., 0]], 0.5)
    else:
        Pillow.fromarray(small()[..., 0]).save(path)
    assert refused(path) == "not_rgb"


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_16_bit_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    deep = small()[:256, :256].astype(np.uint16) * 257
    if kind == "tif":
        write_tiff(path, [deep], 0.5)
    else:
        path.write_bytes(imagecodecs.png_encode(deep))
    assert refused(path) == "not_8_bit"


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_rgba_is_read_and_transparent_px_are_invalid(tmp_path: Path, kind: str) -> None:
    picture = small()[:300, :400]
    alpha = np.full((*picture.shape[:2], 1), 255, np.uint8)
    alpha[100:150, 200:300] = 0
    pixels = np.concatenate([picture, alpha], axis=2)
    path = tmp_path / f"a.{kind}"
    if kind == "tif":
        tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", extrasamples=["unassalpha"], metadata=None)
    else:
        Pillow.fromarray(pixels).save(path)
    with open_slide(path, mpp=0.5) as slide:
        region = slide.read(0, 0, 400, 300, 0.5)
    assert np.array_equal(region.valid, alpha[..., 0] == 255)
    assert np.array_equal(region.pixels[region.valid], picture[region.valid])


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_of_four_bands_the_first_three_are_read(tmp_path: Path, compression: str | None) -> None:
    picture = small()[:300, :400]
    infrared = np.zeros((*picture.shape[:2], 1), np.uint8)  # water: as alpha it would hide the colours
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, np.concatenate([picture, infrared], axis=2), tile=(256, 256), photometric="rgb", compression=compression,
        extrasamples=["unspecified"], metadata=None,
    )  # fmt: skip
    with open_slide(path, mpp=0.5) as slide:
        region = slide.read(0, 0, 400, 300, 0.5)
    assert region.valid.all()
    assert np.array_equal(region.pixels, picture)


def test_one_huge_strip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, small(), rowsperstrip=10_000, metadata=None)
    open_slide(path, mpp=0.5).close()
    monkeypatch.setattr("engine.slides.backends.tiff.MAX_SEGMENT_PX", 1000)
    assert refused(path) == "unsupported"


@pytest.mark.parametrize(("tag", "value"), [("ImageLength", 0), ("ImageLength", 60_000), ("TileWidth", 16)])
def test_a_header_that_does_not_fit_its_tiles_is_damaged(tmp_path: Path, tag: str, value: int) -> None:
    """Found by flipping bytes: sizes of which the file does not hold the tiles."""
    path = write_tiff(tmp_path / "a.tif", [small()], 0.5)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages.first.tags[tag].overwrite(value)
    assert refused(path) == "not_a_slide"
