"""Arrays go in where files do: as slides, as references, as what is enlarged or judged."""

from pathlib import Path

import dask.array as da
import numpy as np
import PIL.Image
import pytest

import engine
from engine.api.runs import picture_file
from engine.core.errors import BagError, ConfigError, EngineError, SlideError
from engine.features.bag_reader import BagFile
from engine.slides.slide import Slide, open_slide
from engine.slides.tissue import TissueConfig, find_tissue
from tests.support.tiny_run import store_model
from tests.support.written_slides import box, tissue, write_tiff

PIXELS = np.array(tissue(350, 550).resize((1100, 1100)))
"""Tissue of 1100² px at 0.5 µm/px: a few 20x tiles."""


def lazily(pixels: np.ndarray) -> da.Array:
    return da.from_array(pixels.transpose(2, 0, 1), chunks=(3, 300, 400))


@pytest.mark.parametrize("array", [PIXELS, PIXELS.transpose(2, 0, 1), lazily(PIXELS)], ids=["hwc", "chw", "dask"])
def test_an_array_is_a_slide(array: object, tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tiff", [PIXELS], 0.5)
    slide = Slide.from_array(array, mpp=0.5, name="a")
    with open_slide(tmp_path / "a.tiff") as stored:
        for window in ((3, 5, 40, 30, 0.5), (-20, 1000, 200, 200, 1.1), (0, 0, 100, 100, 5.0)):
            mine, theirs = slide.read(*window), stored.read(*window)
            np.testing.assert_array_equal(mine.pixels, theirs.pixels)
            np.testing.assert_array_equal(mine.valid, theirs.valid)
        config = TissueConfig(smallest_um2=0)
        np.testing.assert_array_equal(find_tissue(slide, config).mask, find_tissue(stored, config).mask)
        np.testing.assert_array_equal(slide.dask(1.0, chunks=300), stored.dask(1.0, chunks=300))
    assert slide.dask().name == Slide.from_array(array, mpp=0.5).dask().name
    assert slide.dask().name != Slide.from_array(array, mpp=0.6).dask().name


def test_levels_are_taken_as_they_come() -> None:
    slide = Slide.from_array([PIXELS, box(PIXELS, 4)], mpp=0.5)
    assert (slide.sizes, slide.level_for(2.0)) == (((1100, 1100), (275, 275)), 1)
    with pytest.raises(SlideError, match="each smaller"):
        Slide.from_array([PIXELS, PIXELS], mpp=0.5)


@pytest.mark.parametrize(
    ("array", "mpp", "name", "error", "said"),
    [
        (PIXELS.astype(np.float32), 0.5, "a", ConfigError, "float32"),
        (PIXELS[..., 0], 0.5, "a", ConfigError, r"\(1100, 1100\)"),
        ([1, 2], 0.5, "a", ConfigError, "int"),
        (PIXELS, 0.0, "a", EngineError, "positive"),
        (PIXELS, 0.5, "../a", BagError, "without folders"),
    ],
)
def test_other_arrays_are_refused(array: object, mpp: float, name: str, error: type[EngineError], said: str) -> None:
    with pytest.raises(error, match=said):
        Slide.from_array(array, mpp=mpp, name=name)


def test_features_of_an_array_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    write_tiff(tmp_path / "slides" / "a.tiff", [PIXELS[:560, :560]], 0.5)
    keys = {"finder": {"method": "everything"}, "model": {"device": "cpu"}, "encoders": ["demo"], "progress": False}
    stored = engine.extract_features(tmp_path / "slides", tmp_path / "stored", backend="local", **keys)
    slide = Slide.from_array(lazily(PIXELS[:560, :560]), mpp=0.5, name="a")
    given = engine.extract_features([slide], tmp_path / "given", **keys)
    assert [bag.attributes.slide for bag in given] == ["a"]

    def vectors(bag: BagFile) -> np.ndarray:
        return np.concatenate([bag.features(scale) for scale in bag.scales])

    assert len(vectors(given[0])) > 4
    np.testing.assert_array_equal(vectors(given[0]), vectors(stored[0]))
    with pytest.raises(ConfigError, match="backend='ray'"):
        engine.extract_features([slide], tmp_path / "ray", backend="ray", **keys)


def test_a_picture_is_kept_as_a_file(tmp_path: Path) -> None:
    path = picture_file(lazily(PIXELS[:40]), tmp_path / "run" / "reference.png")
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(path)), PIXELS[:40])
    assert picture_file(str(path), tmp_path / "b.png") == path
    with pytest.raises(ConfigError, match="must be uint8"):
        picture_file(PIXELS / 255, tmp_path / "c.png")


def test_a_reference_may_be_an_array(tmp_path: Path) -> None:
    found = {}

    def plan(asked: engine.RunConfig) -> object:
        found["reference"] = asked.reference
        raise ValueError("as far as this goes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.api.runs.prepare", plan)
        with pytest.raises(ConfigError, match="as far as this goes"):
            engine.generate(engine.load_config(output={"folder": str(tmp_path)}), reference=PIXELS)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(found["reference"])), PIXELS)


def test_quality_judges_arrays(tmp_path: Path) -> None:
    keys = {"mpp": 0.5, "encoder": "texture", "stride": 128, "min_tissue": 0.0, "tissue_grey": 256.0}
    found = engine.quality(PIXELS, lazily(PIXELS), out=str(tmp_path), progress=False, kid_subsets=2, **keys)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}
    assert not found.unusable


def test_a_run_keeps_what_it_was_given(tmp_path: Path) -> None:
    """Twice the same array continues the run; another one is refused, and the first stays."""
    keys = {"model": {"source": str(store_model(tmp_path))}, "inversion": {"steps": 2}}
    keys |= {"sampling": {"stride": 100, "weight": 0.0}, "output": {"folder": str(tmp_path / "run"), "formats": []}}
    picture = PIXELS[:64, :64]
    run = engine.enlarge(picture, scale=4, **keys, backend="local", progress=False)
    (kept,) = run.folder.glob("given-*.png")
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(kept)), picture)
    again = engine.enlarge(picture.transpose(2, 0, 1), scale=4, **keys, backend="local", progress=False)
    np.testing.assert_array_equal(again.thumbnail(256), run.thumbnail(256))
    with pytest.raises(EngineError):
        engine.enlarge(255 - picture, scale=4, **keys, backend="local", progress=False)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(kept)), picture)
