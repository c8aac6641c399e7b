"""JPEG: strips put together are one encoding of the whole; scale and provenance are in EXIF."""

import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import pyvips

from engine.core.errors import CanvasError
from engine.images.jpeg import check_jpeg, write_jpeg
from engine.images.ome_zarr import Image
from tests.support.known_picture import HEIGHT, PIXELS, WIDTH, full_disk


def test_strips_are_one_encoding_of_the_whole(image: Image, tmp_path: Path):
    write_jpeg(tmp_path / "a.jpeg", image, 95)
    with PIL.Image.open(tmp_path / "a.jpeg") as jpeg:
        assert jpeg.size == (WIDTH, HEIGHT)
        seen = np.asarray(jpeg)
        exif = jpeg.getexif().tobytes()
    whole = io.BytesIO()
    PIL.Image.fromarray(PIXELS.transpose(1, 2, 0)).save(
        whole, "JPEG", quality=95, subsampling="4:2:0", restart_marker_rows=1, exif=exif
    )
    with PIL.Image.open(whole) as jpeg:
        np.testing.assert_array_equal(seen, np.asarray(jpeg))
    assert np.abs(seen.transpose(2, 0, 1).astype(int) - PIXELS).mean() < 2
    scan = whole.getvalue()[-20_000:]
    assert (tmp_path / "a.jpeg").read_bytes()[-20_000:] == scan


def test_jpeg_opens_in_vips_with_its_scale_and_provenance(image: Image, tmp_path: Path):
    write_jpeg(tmp_path / "a.jpeg", image)
    seen = pyvips.Image.new_from_file(str(tmp_path / "a.jpeg"), fail_on="warning")
    with PIL.Image.open(tmp_path / "a.jpeg") as jpeg:
        np.testing.assert_allclose(seen.numpy(), np.asarray(jpeg), atol=3)
        exif = jpeg.getexif()
    assert seen.xres == pytest.approx(2000)  # px per mm
    assert (exif[282], exif[283], exif[296]) == (20_000, 20_000, 3)  # px per cm
    said = json.loads(exif[270])
    assert (said["synthetic"], said["mpp_um"], said["digest"]) == (True, 0.5, "ab12")


def test_too_large_a_jpeg_is_refused():
    check_jpeg(65500, 1)
    with pytest.raises(ValueError, match="at most 65500 px"):
        check_jpeg(1, 65501)


def test_full_disk_keeps_the_previous_jpeg(image: Image, tmp_path: Path):
    (tmp_path / "a.jpeg").write_bytes(b"old")
    with full_disk(20_000), pytest.raises(CanvasError, match=r"a\.jpeg cannot be written"):
        write_jpeg(tmp_path / "a.jpeg", image)
    assert (tmp_path / "a.jpeg").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpeg"]
