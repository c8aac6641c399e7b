"""Views of a picture: coarser ones and small ones, with their scale; and the table of formats."""

from pathlib import Path
from typing import get_args

import numpy as np
import PIL.Image
import pytest

from engine.images.formats import ENDINGS, Format, check_ending, write_export
from engine.images.ome_zarr import Image
from engine.images.pyramid import FromLevel, reduced
from tests.support.known_picture import PIXELS


def test_without_the_finest_levels(image: Image):
    coarse = FromLevel(image, 1)
    assert coarse.sizes == [(650, 450), (325, 225)]
    assert coarse.mpp_um == 1.0
    np.testing.assert_array_equal(coarse.read(3, 300, 5, 200, level=1), image.read(3, 300, 5, 200, level=2))
    with pytest.raises(ValueError, match=r"level must lie in 0\.\.2"):
        FromLevel(image, 3)


def test_a_thumbnail_is_as_large_as_asked_for(image: Image):
    small = reduced(image, 130)
    assert small.sizes == [(130, 90)]
    assert small.mpp_um == pytest.approx(5.0)
    expected = PIL.Image.fromarray(PIXELS.transpose(1, 2, 0)).resize((90, 130))
    difference = np.abs(small.read(0, 130).transpose(1, 2, 0).astype(int) - np.asarray(expected))
    assert difference[60:, :].mean() < 3
    assert reduced(image, 2000) is image
    for wrong in (0, 2049):
        with pytest.raises(ValueError, match=r"max_px must lie in 1\.\.2048"):
            reduced(image, wrong)


@pytest.mark.parametrize("name", get_args(Format))
def test_every_format_is_written_under_its_ending(image: Image, tmp_path: Path, name: Format):
    path = tmp_path / f"a{ENDINGS[name][0]}"
    check_ending(path, name)
    write_export(path, FromLevel(image, 2), name)
    assert path.exists()
    with pytest.raises(ValueError, match=f"the name of a {name} must end in"):
        check_ending(tmp_path / "a.bmp", name)
