"""Detail falls under blur, and what is no detail (noise, grids, blocks) is flagged instead of praised."""

import io

import numpy as np
import PIL.Image
import pytest
from scipy import ndimage

from engine.images.detail import Detail, DetailSums, detail_of, flags, ratios
from engine.images.metrics import InMemory
from engine.slides.phantom.render import Phantom

TISSUE = np.ascontiguousarray(Phantom.varied(10_500).render(0, 0, 512, 512, 0.5).transpose(2, 0, 1))
Y, X = np.mgrid[:512, :512]


def detail(pixels: np.ndarray) -> Detail:
    return detail_of(InMemory(np.rint(pixels).clip(0, 255).astype(np.uint8)))


def noise(deviation: float) -> np.ndarray:
    return TISSUE + np.random.default_rng(0).normal(0, deviation, TISSUE.shape)


def blurred(sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(TISSUE.astype(float), (0, sigma, sigma))


def jpeg(quality: int) -> np.ndarray:
    data = io.BytesIO()
    PIL.Image.fromarray(TISSUE.transpose(1, 2, 0)).save(data, "JPEG", quality=quality)
    return np.asarray(PIL.Image.open(data)).transpose(2, 0, 1)


def wave(pitch: int) -> np.ndarray:
    return TISSUE + 5 * np.cos(2 * np.pi * X / pitch) * np.cos(2 * np.pi * Y / pitch)


def lines(pitch: int) -> np.ndarray:
    return TISSUE + 10.0 * ((X % pitch == 0) | (Y % pitch == 0))


def blocks(pitch: int) -> np.ndarray:
    steps = np.random.default_rng(0).normal(0, 6, (512 // pitch, 512 // pitch))
    return TISSUE + steps.repeat(pitch, 0).repeat(pitch, 1)


OWN = detail(TISSUE)


def test_a_picture_beside_itself_has_nothing_flagged() -> None:
    assert flags(OWN, OWN) == []
    assert set(ratios(OWN, OWN).values()) == {1.0}


def test_another_window_of_the_tissue_is_hardly_flagged() -> None:
    other = np.ascontiguousarray(Phantom.varied(10_500).render(256, 256, 512, 512, 0.5).transpose(2, 0, 1))
    assert not any("a grid of" in said or "blocks of" in said for said in flags(detail(other), OWN))


def test_every_figure_falls_with_blur() -> None:
    found = [detail(blurred(s)) for s in (0.5, 1.0, 2.0)]
    for name, values in {
        "gradient": [d.gradient for d in (OWN, *found)],
        "dark": [d.dark_share for d in (OWN, *found)],
        "finest": [d.energy[2] for d in (OWN, *found)],
    }.items():
        assert all(a > b for a, b in zip(values, values[1:], strict=False)), name  # type: ignore[operator]
    assert any("gradient" in said and "too little" in said for said in flags(found[1], OWN))


@pytest.mark.parametrize(
    ("pixels", "word"),
    [
        (noise(6), "too much"),
        (wave(4), "grid of 4 px"),
        (lines(16), "grid of 16 px"),
        (blocks(16), "blocks of 16 px"),
        (jpeg(30), "blocks of 8 px"),
    ],
    ids=["noise", "wave of a latent px", "lines of a guide px", "blocks of a guide px", "jpeg"],
)
def test_what_is_no_detail_is_flagged(pixels: np.ndarray, word: str) -> None:
    found = detail(pixels)
    assert found.gradient is not None
    assert OWN.gradient is not None
    assert found.gradient > OWN.gradient, "it would have been praised"
    assert any(word in said for said in flags(found, OWN)), flags(found, OWN)


def test_blurred_tissue_with_noise_does_not_pass() -> None:
    """The gradient alone would say that all is well."""
    base = blurred(1.0)
    mixed = detail(base + np.random.default_rng(0).normal(0, 3.5, base.shape))
    relative = ratios(mixed, OWN)
    assert relative["gradient"] is not None
    assert relative["gradient"] > 0.9
    assert any(said.startswith("energy_4px") and "too little" in said for said in flags(mixed, OWN))


def test_gradient_and_dark_share_by_their_definitions() -> None:
    grey = TISSUE.astype(np.float64).mean(axis=0)
    tissue = grey < 215
    steps = [np.abs(np.diff(grey, axis=i)) for i in (0, 1)]
    both = [tissue[1:] & tissue[:-1], tissue[:, 1:] & tissue[:, :-1]]
    total = sum(s[m].sum() for s, m in zip(steps, both, strict=True)) / sum(m.sum() for m in both)
    assert OWN.gradient == pytest.approx(total, rel=1e-5)
    assert OWN.dark_share == pytest.approx((grey < 110).sum() / tissue.sum())
    assert OWN.tissue_share == pytest.approx(tissue.mean())


def test_energy_of_a_chequerboard_lies_in_one_octave() -> None:
    for side in (1, 2, 4):
        board = np.where((Y // side + X // side) % 2, 120, 80)[None].repeat(3, 0)
        energy = detail(board).energy
        assert energy[2 * side] == pytest.approx(400)
        assert sum(v for v in energy.values() if v) == pytest.approx(400)


def test_bands_and_crops_measure_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.images.detail.BLOCK_PX", 16)
    monkeypatch.setattr("engine.images.detail.BAND_PX", 48)
    banded = detail(TISSUE)
    assert banded.gradient == pytest.approx(OWN.gradient)
    assert banded.energy == pytest.approx(OWN.energy)
    assert banded.grid_share == pytest.approx(OWN.grid_share)
    sums = DetailSums()
    for y in (0, 256):
        for x in (0, 256):
            sums.add(TISSUE[:, y : y + 256, x : x + 256], y, x)
    assert sums.result().energy == pytest.approx(OWN.energy)
    assert sums.result().gradient == pytest.approx(OWN.gradient, rel=0.01)


def test_glass_has_no_detail_to_speak_of() -> None:
    found = detail(np.full((3, 64, 64), 245.0))
    assert (found.gradient, found.dark_share, found.tissue_px) == (None, None, 0)
    assert set(found.energy.values()) == {None}
    assert set(ratios(found, OWN).values()) == {None}
    flat = detail(np.full((3, 64, 64), 90.0))
    assert (flat.gradient, flat.dark_share) == (0.0, 1.0)
    assert ratios(flat, flat)["gradient"] == 1.0
