"""Tissue is found on phantoms, glass and ink are not; masks survive QuPath; shares are exact."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import EngineError, SlideError
from engine.slides.geojson import read_tissue, write_tissue
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.slide import _outline_um, _pen_share, _Slide, write_phantom_slide
from engine.slides.slide import Slide, open_slide
from engine.slides.tissue import Overview, TissueConfig, TissueMask, find_tissue, is_ink, optical_density, read_overview
from tests.support.written_slides import overwrite, tile_bytes, write_tiff

CONFIG = TissueConfig()
IMAGES = Path(os.environ.get("ZOOMLDM_SHARED", Path(__file__).parents[3] / "shared")) / "images"
GLASS = np.full((400, 500, 3), 245, np.uint8)


def glass_slide(folder: Path) -> Path:
    noise = np.random.default_rng(0).normal(0, 2, GLASS.shape)
    return write_tiff(folder / "glass.tif", [np.clip(GLASS + noise, 0, 255).astype(np.uint8)], 4.0)


@pytest.mark.parametrize(("seed", "pen", "blur"), [(3, False, True), (4, True, True)])
def test_dice_on_phantoms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, pen: bool, blur: bool) -> None:
    """Seed 3 is mostly fat."""
    monkeypatch.setattr("engine.slides.phantom.render.FINEST_MPP", 4.0)  # not 64 samples per px: it takes minutes
    height, width, mpp = 450, 525, 4.0
    path = tmp_path / "a.tiff"
    write_phantom_slide(path, Phantom(seed), width, height, mpp, pen, blur)
    with open_slide(path) as slide:
        found = find_tissue(slide, CONFIG).mask
    written = _Slide(Phantom(seed), height, width, mpp, pen, blur)
    rows, columns = np.arange(height), np.arange(width)
    inked = (_pen_share(written, rows, columns) > 0.5) if pen else np.zeros((height, width), bool)
    truth = (_outline_um(written, rows, columns) > 0) & ~inked
    truth, inked = truth[::2, ::2], inked[::2, ::2]  # the overview has 8 µm/px
    found = found[: truth.shape[0], : truth.shape[1]]
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) >= 0.95  # measured 0.97 … 0.99
    assert (found & inked).sum() <= 0.01 * inked.sum()  # measured 0, though half of the stroke lies on tissue


def test_the_glass_of_a_small_slide_is_no_hole(tmp_path: Path) -> None:
    picture = np.full((400, 1024, 3), 245, np.uint8)
    picture[:, :524] = (190, 100, 170)
    picture[150:250, 200:300] = 245  # a lumen
    path = write_tiff(tmp_path / "a.tif", [picture], 0.5)
    with open_slide(path) as slide:
        found = find_tissue(slide, CONFIG)
    assert found.total_share == pytest.approx(524 / 1024, abs=0.08)
    assert found.mask[12, 15]  # the lumen belongs to it


def test_bare_glass_has_no_tissue(tmp_path: Path) -> None:
    with open_slide(glass_slide(tmp_path)) as slide:
        assert not find_tissue(slide, CONFIG).mask.any()
        assert find_tissue(slide, TissueConfig("everything")).total_share == 1


@pytest.mark.parametrize(
    ("light", "ink"),
    [
        ((60, 110, 185), True),  # blue pen
        ((40, 120, 70), True),  # green
        ((225, 45, 60), True),  # red
        ((25, 25, 28), True),  # black
        ((215, 130, 185), False),  # eosin
        ((90, 60, 130), False),  # dense nuclei
        ((120, 80, 50), False),  # DAB
        ((190, 60, 90), False),  # blood
        ((150, 150, 152), False),  # a shadow: no ink, and no tissue either
    ],
)
def test_ink_is_told_by_its_hue(light: tuple[int, int, int], ink: bool) -> None:
    pixels = GLASS.copy()
    pixels[100:200, 100:200] = light
    overview = Overview(pixels, np.ones(GLASS.shape[:2], bool), 8.0, (16.0, 16.0))
    assert is_ink(optical_density(overview))[150, 150] == ink


@pytest.mark.skipif(not IMAGES.is_dir(), reason="no shared pictures here")
def test_a_real_picture_full_of_tissue() -> None:
    with open_slide(IMAGES / "brca_001.jpeg", mpp=0.5) as slide:
        assert find_tissue(slide, CONFIG).total_share > 0.97


def test_shares_are_exact_areas() -> None:
    rng = np.random.default_rng(1)
    mask = rng.random((20, 30)) > 0.5
    tissue = TissueMask(mask, (10.0, 5.0), (300, 100))
    fine = np.pad(np.kron(mask, np.ones((5, 10))), ((0, 50), (0, 50)))  # level-0 px
    x, y = rng.integers(0, 280, 40), rng.integers(0, 90, 40)
    expected = [fine[b : b + 33, a : a + 47].mean() for a, b in zip(x, y, strict=True)]
    assert tissue.share(x, y, 47, 33) == pytest.approx(expected)
    assert tissue.share(x[None, :], y[:, None], 47, 33).shape == (40, 40)
    assert tissue.share(np.array([2.5]), np.array([0.0]), 5.0, 5.0) == pytest.approx(float(mask[0, 0]))


def test_a_method_plugs_in_and_is_checked(tmp_path: Path) -> None:
    def left(overview: Overview) -> np.ndarray:
        return np.arange(overview.valid.shape[1])[None, :].repeat(overview.valid.shape[0], 0) < 50

    with open_slide(glass_slide(tmp_path)) as slide:
        assert find_tissue(slide, CONFIG, left).total_share == pytest.approx(0.2)
        with pytest.raises(ValueError, match="a tissue mask must be bool"):
            find_tissue(slide, CONFIG, lambda overview: overview.pixels[..., 0])
    with pytest.raises(ValueError, match="must be positive"):
        TissueConfig(mpp=0)


def test_a_damaged_level_is_replaced_by_the_finer_one(tmp_path: Path) -> None:
    picture = np.asarray(Phantom(2).render(0, 0, 1024, 1024, 0.5))
    path = write_tiff(tmp_path / "a.tif", [picture, picture[::4, ::4].copy()], 2.0, "jpeg")  # the scale is made up
    with open_slide(path) as slide:
        whole = read_overview(slide, 8.0)
    overwrite(path, tile_bytes(path, 10, 10, 1)[0], bytes(64))
    with open_slide(path) as slide:
        assert slide.read(0, 0, 100, 100, 8.0).damaged == 1
        mended = read_overview(slide, 8.0)
    assert mended.valid.all()
    assert np.abs(mended.pixels.mean((0, 1)) - whole.pixels.mean((0, 1))).max() < 6


@pytest.fixture
def slide(tmp_path: Path) -> Slide:
    return open_slide(glass_slide(tmp_path))


def test_geojson_gives_the_same_mask_back(tmp_path: Path, slide: Slide) -> None:
    rng = np.random.default_rng(2)
    for share in (0.02, 0.5, 0.9, 0.0):
        tissue = TissueMask(rng.random((200, 250)) < share, slide.field(1, 8.0), (slide.width, slide.height))
        write_tissue(tmp_path / "t.geojson", tissue)
        back = read_tissue(tmp_path / "t.geojson", slide, 8.0)
        assert np.array_equal(back.mask, tissue.mask)
        assert back.scale == tissue.scale


def test_geojson_is_what_qupath_takes(tmp_path: Path, slide: Slide) -> None:
    mask = np.zeros((200, 250), bool)
    mask[20:60, 30:90] = True
    mask[30:40, 40:50] = False
    write_tissue(tmp_path / "t.geojson", TissueMask(mask, slide.field(1, 8.0), (slide.width, slide.height)))
    feature = json.loads((tmp_path / "t.geojson").read_text())["features"][0]
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "Tissue"
    outline, hole = feature["geometry"]["coordinates"]
    assert outline[0] == outline[-1]
    assert (np.min(outline, axis=0).tolist(), np.max(outline, axis=0).tolist()) == ([60, 40], [180, 120])
    assert len(hole) < 12  # straight sides have no points


def polygon(name: str | None, *rings: list[list[float]], kind: str = "Polygon") -> dict:  # type: ignore[type-arg]
    properties = {} if name is None else {"classification": {"name": name}}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": list(rings)}, "properties": properties}


SQUARE = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]


def test_edited_annotations_are_read(tmp_path: Path, slide: Slide) -> None:
    path = tmp_path / "t.geojson"
    inner = [[20.3, 20], [60, 20], [60, 60], [20.3, 60], [20.3, 20]]
    path.write_text(json.dumps([polygon(None, SQUARE), polygon("Ignore*", inner)]))
    assert read_tissue(path, slide, 8.0).mask.sum() == 50 * 50 - 20 * 20
    path.write_text(json.dumps(polygon("Tissue", [SQUARE, inner], kind="MultiPolygon")))
    assert read_tissue(path, slide, 8.0).mask.sum() == 50 * 50 - 20 * 20
    path.write_text('{"type": "FeatureCollection", "features": []}')
    assert not read_tissue(path, slide, 8.0).mask.any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "must be a readable GeoJSON"),
        ('{"features": 3}', "must be a GeoJSON FeatureCollection"),
        (json.dumps(polygon("Tumor", SQUARE)), "feature 1 must be of class Tissue, Ignore"),
        (json.dumps(polygon(None, SQUARE, kind="LineString")), "feature 1 must be a Polygon"),
        (json.dumps(polygon(None, [[0, 0], [1, None]])), "must have finite"),  # type: ignore[list-item]
        (json.dumps(polygon(None, [[0, 0, 0], [1, 1]])), "must be a Polygon"),
    ],
)
def test_wrong_annotations_are_named(tmp_path: Path, slide: Slide, content: str, message: str) -> None:
    path = tmp_path / "t.geojson"
    path.write_text(content)
    with pytest.raises(EngineError, match=message):
        read_tissue(path, slide, 8.0)


def test_an_overview_larger_than_any_glass_is_refused_before_it_is_made(slide: Slide) -> None:
    """A wrong µm/px, a wrong size in a damaged header or a typing error ask for petabytes."""
    (slide.path.parent / "a.geojson").write_text("[]")
    for ask in (lambda: read_overview(slide, 1e-4), lambda: read_tissue(slide.path.parent / "a.geojson", slide, 1e-4)):
        with pytest.raises(
            SlideError, match=r"must have at most 268435456 px; at 0.0001 µm/px.*--finder\.mpp"
        ) as caught:
            ask()
        assert caught.value.code == "too_large"
