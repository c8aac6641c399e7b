"""The phantom is one function of position: windows, magnifications and knobs must agree with each other."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from engine.slides.phantom.render import Phantom
from engine.slides.phantom.slide import write_phantom_slide

DUCTS_UM = (2400.0, 500.0)
"""A corner in seed 5 with ducts, stroma and a little fat around it."""


def box_reduce(picture: np.ndarray, factor: int) -> np.ndarray:
    h, w = picture.shape[0] // factor, picture.shape[1] // factor
    return picture[: h * factor, : w * factor].reshape(h, factor, w, factor, 3).mean(axis=(1, 3))


def nuclear_share(picture: np.ndarray) -> float:
    """Return the share of pixels dark in red: haematoxylin absorbs red, eosin does not."""
    return float((picture[..., 0] < 125).mean())


def test_same_seed_same_bytes_other_seed_other_picture() -> None:
    first = Phantom(3).render(1000, 2000, 128, 128, 0.5)
    assert np.array_equal(first, Phantom(3).render(1000, 2000, 128, 128, 0.5))
    assert np.abs(first.astype(int) - Phantom(4).render(1000, 2000, 128, 128, 0.5)).mean() > 5


@pytest.mark.parametrize(("mpp", "split"), [(0.5, 143), (0.25, 100), (2.0, 31), (0.7, 50)])
def test_windows_tile_exactly(mpp: float, split: int) -> None:
    phantom = Phantom(7)
    spans = ((0, split), (split, 200 - split))
    big = phantom.render(-90 * mpp, 2000 * mpp, 200, 200, mpp)
    rows = [[phantom.render((y - 90) * mpp, (x + 2000) * mpp, h, w, mpp) for x, w in spans] for y, h in spans]
    assert np.array_equal(big, np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0))


def test_long_nuclei_are_not_lost_at_a_border() -> None:
    phantom = Phantom(5, pleomorphism=1.0)
    big = phantom.render(*DUCTS_UM, 400, 400, 0.5)
    for cut in range(20, 380, 24):
        right = phantom.render(DUCTS_UM[0], DUCTS_UM[1] + cut * 0.5, 400, 20, 0.5)
        assert np.array_equal(big[:, cut : cut + 20], right), cut


def test_far_from_the_origin_windows_still_tile() -> None:
    phantom = Phantom(7)
    big = phantom.render(80_000, 120_000.5, 64, 300, 0.5)
    assert np.array_equal(big[:, 120:], phantom.render(80_000, 120_060.5, 64, 180, 0.5))


@pytest.mark.parametrize("factor", [2, 4, 16])
def test_low_magnification_is_the_mean_of_high(factor: int) -> None:
    phantom = Phantom(11)
    high = phantom.render(500, 3000, 512, 512, 0.5)
    low = phantom.render(500, 3000, 512 // factor, 512 // factor, 0.5 * factor)
    assert np.abs(box_reduce(high, factor) - low).max() <= 1.0


def test_knobs_that_are_not_given_follow_the_one_they_belong_to() -> None:
    plain, named = Phantom(5, 0.8, 0.2), Phantom(5, 0.8, 0.2, chromatin=0.8, lumina=0.2)
    assert np.array_equal(plain.render(*DUCTS_UM, 128, 128, 0.5), named.render(*DUCTS_UM, 128, 128, 0.5))
    with pytest.raises(ValueError, match="chromatin must lie in"):
        Phantom(5, chromatin=1.5)


def test_chromatin_shows_at_20x_and_less_at_5x_than_size_does() -> None:
    def difference(a: Phantom, b: Phantom, factor: int) -> float:
        one, other = (box_reduce(p.render(*DUCTS_UM, 640, 640, 0.5), factor) for p in (a, b))
        return float(np.abs(one - other).mean())

    smooth, coarse = (Phantom(5, 0.5, 0.5, chromatin=c) for c in (0.0, 1.0))
    even, varied = (Phantom(5, p, 0.5, chromatin=0.5) for p in (0.0, 1.0))
    assert difference(smooth, coarse, 1) > 1.5
    of_chromatin = difference(smooth, coarse, 4) / difference(smooth, coarse, 1)
    of_size = difference(even, varied, 4) / difference(even, varied, 1)
    assert of_chromatin < 0.9 * of_size  # measured 0.70 and 0.81


def test_lumina_can_be_kept_while_outlines_change() -> None:
    def white(phantom: Phantom) -> float:
        return float((phantom.render(*DUCTS_UM, 1024, 1024, 1.0).min(axis=2) > 200).mean())

    kept = [white(Phantom(5, 0.3, a, lumina=0.3)) for a in (0.0, 1.0)]
    free = [white(Phantom(5, 0.3, a)) for a in (0.0, 1.0)]
    assert abs(kept[0] - kept[1]) < 0.3 * abs(free[0] - free[1])


def test_pleomorphism_shows_at_20x_and_hardly_in_the_mean_colour() -> None:
    calm, wild = (Phantom(5, p, 0.5).render(*DUCTS_UM, 640, 640, 0.5) for p in (0.0, 1.0))
    at_20x = np.abs(calm.astype(int) - wild).mean()
    at_80_um = np.abs(box_reduce(calm, 160) - box_reduce(wild, 160)).mean()
    assert at_20x > 4  # measured 6.4 grey levels
    assert at_80_um < 1.5  # measured 0.56
    assert np.abs(calm.mean((0, 1)) - wild.mean((0, 1))).max() < 1.0  # measured 0.21


def test_architecture_shows_at_5x_and_leaves_the_nuclei_alone() -> None:
    orderly, ragged = (Phantom(5, 0.3, a).render(*DUCTS_UM, 256, 256, 4.0) for a in (0.0, 1.0))
    assert np.abs(box_reduce(orderly, 4) - box_reduce(ragged, 4)).mean() > 10
    shares = [nuclear_share(Phantom(5, 0.3, a).render(*DUCTS_UM, 1500, 1500, 0.5)) for a in (0.0, 1.0)]
    assert shares[0] == pytest.approx(shares[1], rel=0.25)


@pytest.mark.parametrize("change", [{"pleomorphism": 1.2}, {"architecture": -0.1}])
def test_refuses_knobs_outside_their_range(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        Phantom(0, **change)


def test_refuses_an_empty_window() -> None:
    with pytest.raises(ValueError, match="at least 1x1 px"):
        Phantom(0).render(0, 0, 0, 5, 0.5)


def test_slide_has_levels_scale_glass_and_tissue(tmp_path: Path) -> None:
    path = tmp_path / "slide.tiff"
    phantom = Phantom(2, architecture=0.2)
    write_phantom_slide(path, phantom, 1500, 1100, mpp=0.5)
    with tifffile.TiffFile(path) as tiff:
        pages = list(tiff.pages)
        assert [page.shape for page in pages] == [(1100, 1500, 3), (275, 375, 3)]
        assert [page.subfiletype for page in pages] == [0, 1]
        assert all(page.tile == (256, 256) for page in pages)
        for i, page in enumerate(pages):
            numerator, denominator = page.tags["XResolution"].value
            assert 1e4 * denominator / numerator == pytest.approx(0.5 * 4**i)
        full, small = (page.asarray() for page in pages)
    border = np.concatenate([full[:40].reshape(-1, 3), full[-40:].reshape(-1, 3)])
    assert border.min() > 230
    assert border.std() > 0.3
    middle = full[450:650, 650:850]
    assert np.abs(middle.astype(int) - phantom.render(225, 325, 200, 200, 0.5)).mean() < 4  # JPEG
    assert np.abs(box_reduce(full, 4) - small).mean() < 2


def test_pen_and_blur_change_only_their_part(tmp_path: Path) -> None:
    pictures = []
    for name, flags in (("plain", {}), ("marred", {"pen_marks": True, "blurred_patch": True})):
        path = tmp_path / f"{name}.tiff"
        write_phantom_slide(path, Phantom(2), 1024, 1024, **flags)
        pictures.append(tifffile.imread(path, key=0).astype(int))
    plain, marred = pictures
    stroke = marred[760:840, 480:544]
    assert (stroke[..., 2] - stroke[..., 0]).max() > 60
    blurred = (slice(420, 500), slice(370, 450))
    assert np.abs(np.diff(marred[blurred], axis=1)).mean() < 0.5 * np.abs(np.diff(plain[blurred], axis=1)).mean()
    assert np.array_equal(plain[:128], marred[:128])
