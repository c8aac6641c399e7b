"""A slide of which nothing decodes is damaged, not without tissue; a cut stream is judged by what can be decoded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from engine.conditions.reference import read_reference
from engine.core.errors import SlideError
from engine.datasets.blocks import PreparedPlan, PrepareTask, PrepareWorker
from engine.datasets.config import PrepareConfig
from engine.features.blocks import ExtractPlan, ExtractTask, SlideWorker
from engine.features.config import BlockConfig, ExtractConfig
from engine.pipeline.stages import SlideFailure
from engine.slides.inspect import inspect_slide
from engine.slides.slide import open_slide
from engine.slides.tile_grid import GridConfig
from engine.slides.tissue import TissueConfig

PX, TILE = 768, 192
CUTS = {"third": lambda n: n // 3, "half": lambda n: n // 2, "end": lambda n: n - 2, "half the end": lambda n: n - 1}


def picture(px: int = PX) -> np.ndarray:
    """Return pink tissue with dark grains on glass, uint8 (px, px, 3)."""
    y, x = np.mgrid[:px, :px]
    pixels = np.full((px, px, 3), 243, np.uint8)
    inside = (x - px / 2) ** 2 + (y - px / 2) ** 2 < (px * 0.45) ** 2
    pixels[inside] = (210, 140, 190)
    pixels[inside & (np.sin(x / 5) * np.sin(y / 5) > 0.6)] = (110, 60, 140)
    return pixels


def write_cut(path: Path, cut: Any, compression: Any = "jpeg", which: Any = lambda y, x: True) -> Path:
    """Write a tiled TIFF and cut the streams of some tiles: `cut` says how much of n bytes is left."""
    more = {"compressionargs": {"level": 85}} if compression == "jpeg" else {}
    tifffile.imwrite(path, picture(), tile=(TILE, TILE), photometric="rgb", compression=compression, metadata=None,
                     resolution=(20000, 20000), resolutionunit="CENTIMETER", **more)  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages.first.tags["TileByteCounts"]
        columns = PX // TILE
        counts = [cut(n) if which(i // columns, i % columns) else n for i, n in enumerate(tag.value)]
        tag.overwrite(counts)
    return path


def planned(path: Path, **changes: Any) -> ExtractPlan | SlideFailure:
    config = replace(ExtractConfig(str(path.parent), overrides=None), **changes)
    plan = next(SlideWorker(config, ("20x", "5x")).plan(ExtractTask("a", path)))
    assert isinstance(plan, ExtractPlan | SlideFailure)
    return plan


@pytest.mark.parametrize("method", ["stain", "everything"])
@pytest.mark.parametrize("cut", ["third", "half"])
def test_a_slide_of_which_nothing_decodes_is_damaged(tmp_path: Path, cut: str, method: Any) -> None:
    path = write_cut(tmp_path / "a.tif", CUTS[cut])
    row = inspect_slide(path, TissueConfig(method), GridConfig())
    assert (row.problem, row.usable, row.unseen_share, row.tissue_share) == ("damaged", False, 1.0, 0.0)
    assert "100% of it cannot be decoded" in row.message
    failure = planned(path, finder=TissueConfig(method))
    assert isinstance(failure, SlideFailure)
    assert failure.code == "damaged"
    with pytest.raises(ValueError, match="must hold all of its pixels; 16 of its tiles or strips cannot be decoded"):
        read_reference(path)


def test_a_preparation_refuses_it_too(tmp_path: Path) -> None:
    path = write_cut(tmp_path / "a.tif", CUTS["half"])
    failure = next(PrepareWorker(PrepareConfig(str(tmp_path))).plan(PrepareTask("a", path)))
    assert isinstance(failure, SlideFailure)
    assert failure.code == "damaged"
    write_cut(path, CUTS["half"], which=lambda y, x: (y, x) == (1, 1))
    plan = next(PrepareWorker(PrepareConfig(str(tmp_path))).plan(PrepareTask("a", path)))
    assert isinstance(plan, PreparedPlan)
    assert plan.unseen == pytest.approx(1 / 16, abs=0.03)


@pytest.mark.parametrize("cut", ["end", "half the end"])
@pytest.mark.parametrize("compression", ["jpeg", 34892, "jpeg2000", "deflate"])
def test_a_stream_that_lacks_its_end_marker_alone_is_whole(tmp_path: Path, compression: Any, cut: str) -> None:
    path = write_cut(tmp_path / "a.tif", lambda n: n, compression)
    with open_slide(path) as slide:
        clean = slide.read(0, 0, PX, PX, 0.5).pixels
    write_cut(path, CUTS[cut], compression)
    with open_slide(path) as slide:
        region = slide.read(0, 0, PX, PX, 0.5)
    assert (region.damaged, region.lost) == (0, None)
    assert np.array_equal(region.pixels, clean)
    assert np.array_equal(read_reference(path), clean)


@pytest.mark.parametrize("share", [0.34, 0.9])
@pytest.mark.parametrize("compression", [
    "jpeg", 34892, "jpeg2000", "lzw", "deflate", "packbits", "zstd", "lzma", "webp", "jpegxl", "jpegxr", "png", "lerc",
])  # fmt: skip
def test_a_cut_stream_is_damage_whatever_its_codec(tmp_path: Path, compression: Any, share: float) -> None:
    path = write_cut(tmp_path / "a.tif", lambda n: int(n * share), compression)
    with open_slide(path) as slide:
        region = slide.read(0, 0, PX, PX, 0.5)
    assert (region.damaged, region.valid.any()) == (16, False)
    with pytest.raises(ValueError, match="16 of its tiles or strips cannot be decoded"):
        read_reference(path)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("compression", [34892, "jpegxr", "jpeg2000", "webp"])
def test_a_fourth_sample_hides_no_damage(tmp_path: Path, compression: Any, share: float) -> None:
    path, pixels = tmp_path / "a.tif", np.dstack([picture(256), np.full((256, 256), 255, np.uint8)])
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", compression=compression, metadata=None,
                     extrasamples=["unassalpha"])  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages.first.tags["TileByteCounts"]
        tag.overwrite([int(n * share) for n in tag.value])
    with open_slide(path, mpp=0.5) as slide:
        region = slide.read(0, 0, 256, 256, 0.5)
    assert (region.damaged, region.valid.mean()) == ((0, 1) if share == 1 else (4, 0))


@pytest.mark.parametrize("compression", ["jpeg", 34892, "jpegxr"])
def test_planes_whose_damage_nobody_would_notice_are_refused(tmp_path: Path, compression: Any) -> None:
    path = tmp_path / "a.tif"
    planes = np.ascontiguousarray(picture(256).transpose(2, 0, 1))
    tifffile.imwrite(path, planes, tile=(128, 128), photometric="rgb", planarconfig="separate", compression=compression,
                     metadata=None)  # fmt: skip
    with pytest.raises(SlideError, match="planes must be stored in a form whose damage is noticed"):
        open_slide(path, mpp=0.5)
    with pytest.raises(ValueError, match="planes must be stored in a form whose damage is noticed"):
        read_reference(path)


def test_loss_below_the_limit_is_said(tmp_path: Path) -> None:
    path = write_cut(tmp_path / "a.tif", CUTS["half"], which=lambda y, x: (y, x) == (1, 1))
    row = inspect_slide(path, TissueConfig(), GridConfig())
    assert (row.problem, row.usable) == ("damaged_parts", True)
    assert row.unseen_share == pytest.approx(1 / 16, abs=0.03)
    assert "of the slide could not be looked at for tissue" in row.message
    plan = planned(path)
    assert isinstance(plan, ExtractPlan)
    assert plan.tissue.lost == row.unseen_share
    assert plan.damaged >= 1
    strict = planned(path, blocks=BlockConfig(slide_damage=0.01))
    assert isinstance(strict, SlideFailure)
    assert "raise --blocks.slide_damage" in strict.message


def test_glass_that_was_never_written_is_no_loss(tmp_path: Path) -> None:
    path = write_cut(tmp_path / "a.tif", lambda n: 0, which=lambda y, x: y > 0)
    row = inspect_slide(path, TissueConfig(), GridConfig())
    assert (row.unseen_share, row.problem) == (0.0, "")


def test_a_level_that_is_whole_still_shows_the_tissue(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    streams = [imagecodecs.jpeg8_encode(picture()[y : y + TILE, x : x + TILE], level=85)
               for y in range(0, PX, TILE) for x in range(0, PX, TILE)]  # fmt: skip
    with tifffile.TiffWriter(path) as tiff:
        options: dict[str, Any] = {
            "compression": "jpeg",
            "photometric": "ycbcr",
            "subsampling": (2, 2),
            "metadata": None,
        }
        scale: Any = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
        tiff.write((s[: len(s) // 2] for s in streams), shape=(PX, PX, 3), dtype="uint8", tile=(TILE, TILE), **options,
                   **scale)  # fmt: skip
        tiff.write(picture()[::4, ::4], photometric="rgb", tile=(TILE, TILE), subfiletype=1, metadata=None)
    row = inspect_slide(path, TissueConfig(), GridConfig())
    assert row.unseen_share == 0
    assert row.tiles_20x  # they will be masked, and too many of them fail the slide


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_photo_that_breaks_off_is_no_reference(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(512)).save(path, quality=90)
    whole, clean = path.read_bytes(), read_reference(path)
    path.write_bytes(whole[:-2])
    assert np.array_equal(read_reference(path), clean)
    path.write_bytes(whole[: int(len(whole) * share)] + whole[-2:])  # Pillow fills it with grey and says nothing
    with Image.open(path) as forgiving:
        assert np.asarray(forgiving).shape == (512, 512, 3)
    with pytest.raises(ValueError, match="it is damaged"):
        read_reference(path)
