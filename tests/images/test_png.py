"""PNG: the picture's pixels, its scale and its provenance; previews."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import pyvips

from engine.images.ome_zarr import Image
from engine.images.png import check_png, write_picture, write_png, write_preview
from tests.support.known_picture import PIXELS


def test_png_is_the_picture_and_says_synthetic(image: Image, tmp_path: Path):
    write_png(tmp_path / "a.png", image)
    with PIL.Image.open(tmp_path / "a.png") as png:
        np.testing.assert_array_equal(np.asarray(png).transpose(2, 0, 1), PIXELS)
        said = json.loads(png.info["provenance"])
    assert (said["synthetic"], said["mpp_um"], said["seed"]) == (True, 0.5, 7)


def test_png_opens_in_vips_with_its_scale(image: Image, tmp_path: Path):
    write_png(tmp_path / "a.png", image)
    seen = pyvips.Image.new_from_file(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(seen.numpy().transpose(2, 0, 1), PIXELS)
    assert (seen.xres, seen.yres) == (2000, 2000)  # px per mm


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
