"""The report's pictures show the most attended tiles where they lie, and say why when they cannot."""

import base64
import io
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from engine.core.errors import EngineError
from mil.data.slide_fields import SlideFields
from mil.report.attended import PICTURE_PX, TOP_TILES, attended, most_attended

TILE = (16.0, 16.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with attention of one positive and one negative slide, on a grid of 8 x 4 tiles."""
    folder = tmp_path / "run/folds/repeat0_fold0"
    folder.mkdir(parents=True)
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(4)), axis=-1).reshape(-1, 2) * 16
    with h5py.File(folder / "attention.h5", "w") as file:
        for name, label in (("yes", 1), ("no", 0)):
            group = file.create_group(name)
            weights = np.arange(1, 33, dtype=np.float32)
            group["attention"], group["coords"] = weights / weights.sum(), grid.astype(np.int64)
            group.attrs.update({"logit": 1.5, "label": label, "tile_level0_px": TILE})
    return tmp_path / "run"


def write_slide(folder: Path, name: str = "yes.png") -> None:
    """128 x 64 px without µm/px: red is x, green is y."""
    folder.mkdir(exist_ok=True)
    y, x = np.mgrid[:64, :128]
    Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)).save(folder / name)


def pictures_in(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), float) for text in found]


def test_the_most_attended_come_first(run: Path) -> None:
    (slide,) = most_attended(run)
    assert slide.name == "yes"
    assert slide.coords is not None
    assert slide.coords[:2].tolist() == [[112, 48], [96, 48]]
    assert slide.times_even[0] == pytest.approx(32 / 16.5)


def test_pictures_show_the_tiles(run: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "slides")
    found = pictures_in(attended(run, SlideFields(tmp_path / "slides")))
    assert len(found) == 2 * TOP_TILES
    tile, around = found[:2]
    assert tile.shape == around.shape == (PICTURE_PX, PICTURE_PX, 3)
    np.testing.assert_allclose(tile.mean((0, 1)), (119.5, 55.5, 0), atol=2)
    np.testing.assert_allclose(around[3, 3], (88, 24, 0), atol=4)  # 24 px left of and above the tile
    assert (around[-3, -3] > 250).all()  # beyond the slide
    inner = around[95:129, 95:129].mean((0, 1))
    np.testing.assert_allclose(inner, (120, 56, 0), atol=2)  # the tile is in the middle


def test_pictures_are_of_the_series_of_the_features(run: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    blue, green = (np.full((64, 128, 3), colour, np.uint8) for colour in ((0, 0, 200), (0, 200, 0)))
    with tifffile.TiffWriter(tmp_path / "slides" / "yes.ome.tiff", ome=True) as tiff:
        for pixels in (blue, green):
            tiff.write(pixels, photometric="rgb", tile=(64, 64), metadata={"axes": "YXS"})
    for series, wanted in ((None, (0, 0, 200)), (0, (0, 0, 200)), (1, (0, 200, 0))):
        if series is not None:
            with h5py.File(run / "folds/repeat0_fold0/attention.h5", "r+") as file:
                file["yes"].attrs["series"] = series
        tile = pictures_in(attended(run, SlideFields(tmp_path / "slides")))[0]
        np.testing.assert_allclose(tile.mean((0, 1)), wanted, atol=3)


def test_without_slides_it_says_how(run: Path) -> None:
    html = attended(run, None)
    assert "--slides DIR" in html
    assert "<img" not in html


def test_a_slide_that_is_not_there_or_twice_is_named(run: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    write_slide(slides, "other.png")
    html = attended(run, SlideFields(slides))
    assert "yes: no pictures" in html
    assert "it holds none" in html
    write_slide(slides, "yes.png")
    write_slide(slides, "yes.tiff")
    assert "two or more" in attended(run, SlideFields(slides))
    (slides / "yes.tiff").unlink()
    (slides / "yes.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert "yes: no pictures" in attended(run, SlideFields(slides))


def test_features_without_places_have_no_pictures(run: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "slides")
    with h5py.File(run / "folds/repeat0_fold0/attention.h5", "r+") as file:
        del file["yes/coords"]
    html = attended(run, SlideFields(tmp_path / "slides"))
    assert "does not say where tiles lie" in html
    assert "<td>unknown</td>" in html


def test_a_folder_without_slides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="must hold slides"):
        SlideFields(tmp_path)


def test_fields_may_be_oblong(tmp_path: Path) -> None:
    write_slide(tmp_path / "slides")
    field = SlideFields(tmp_path / "slides")("yes", (32, 16), (32, 16), 64)
    assert field.shape == (32, 64, 3)
    np.testing.assert_allclose(field.mean((0, 1)), (47.5, 23.5, 0), atol=1)
