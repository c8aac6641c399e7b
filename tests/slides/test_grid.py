"""Every child lies in its parent, both scales come from one read, and the edge is what the policy says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import SlideError
from engine.slides.slide import Slide, open_slide
from engine.slides.tile_grid import GridConfig, TileGrid, plan_grid, read_parent
from engine.slides.tissue import TissueMask
from tests.support.written_slides import bar_centres_um, box, overwrite, ruler, tile_bytes, write_tiff


def everything(slide: Slide) -> TissueMask:
    scale = slide.field(1, 8.0)
    size = (int(np.ceil(slide.height / scale[1])), int(np.ceil(slide.width / scale[0])))
    return TissueMask(np.ones(size, bool), scale, (slide.width, slide.height))


def patchy(slide: Slide, seed: int) -> TissueMask:
    whole = everything(slide)
    coarse = np.random.default_rng(seed).random(tuple(-(-n // 12) for n in whole.mask.shape)) > 0.5
    mask = np.kron(coarse, np.ones((12, 12)))[: whole.mask.shape[0], : whole.mask.shape[1]] > 0
    return replace(whole, mask=mask)


@pytest.fixture(params=[0.5, 0.25, 0.29, 0.499])
def slide(request: pytest.FixtureRequest, tmp_path: Path) -> Slide:
    return open_slide(write_tiff(tmp_path / "a.tif", [ruler(request.param)], request.param))


def check(grid: TileGrid, slide: Slide) -> None:
    n, p = len(grid), len(grid.parent_coords)
    assert (grid.coords.shape, grid.parent.shape, grid.cell.shape, grid.tissue.shape) == ((n, 2), (n,), (n,), (n,))
    assert grid.coords.dtype == grid.parent.dtype == np.int64
    assert set(grid.parent) == set(range(p))  # each parent has a child, each index a parent
    inside = grid.coords - grid.parent_coords[grid.parent]
    expected = np.stack([grid.cell % 4, grid.cell // 4], axis=1) * grid.field
    assert np.abs(inside - expected).max(initial=0) <= 0.5
    assert len({(*c,) for c in grid.coords.tolist()}) == n
    assert (grid.coords < [slide.width, slide.height]).all()
    assert sum(len(range(*grid.children(i).indices(n))) for i in range(p)) == n
    assert all((grid.parent[grid.children(i)] == i).all() for i in range(p))


@pytest.mark.parametrize("edge", ["drop", "pad"])
def test_invariants(slide: Slide, edge: str) -> None:
    config = GridConfig(edge=edge)  # type: ignore[arg-type]
    for seed in range(4):
        tissue = patchy(slide, seed)
        grid = plan_grid(slide, tissue, config)
        check(grid, slide)
        assert (grid.tissue >= config.min_tissue).all()
        share = tissue.share(grid.coords[:, 0], grid.coords[:, 1], *grid.field)
        assert grid.tissue == pytest.approx(share, abs=0.02)
        if edge == "drop":
            assert (grid.coords + grid.field <= np.array([slide.width, slide.height]) + 1).all()


def test_the_edge_policy(slide: Slide) -> None:
    """The ruler is 1100 x 700 µm: 8.6 x 5.5 tiles of 128 µm."""
    kept = {edge: plan_grid(slide, everything(slide), GridConfig(edge=edge)) for edge in ("drop", "pad")}
    assert {edge: len(grid) for edge, grid in kept.items()} == {"drop": 8 * 5, "pad": 9 * 6}
    assert {edge: len(grid.parent_coords) for edge, grid in kept.items()} == {"drop": 4, "pad": 6}
    strict = plan_grid(slide, everything(slide), GridConfig(min_tissue=0.5))
    assert len(strict) == 9 * 5  # the lower row is .47 slide
    last = read_parent(slide, kept["pad"], 5)
    assert last.children_valid.min() < 0.5
    assert last.parent_valid == pytest.approx(0.6 / 4 * 1.47 / 4, abs=0.02)
    assert read_parent(slide, kept["pad"], 0).parent_valid == 1


def test_no_tissue_no_tiles(slide: Slide) -> None:
    mask = everything(slide)
    grid = plan_grid(slide, replace(mask, mask=~mask.mask), GridConfig())
    check(grid, slide)
    assert len(grid) == len(grid.parent_coords) == 0


def test_a_printed_ruler_in_the_tiles(slide: Slide) -> None:
    """±1 px at 20x, in children and in parents, from their stored coordinates."""
    grid = plan_grid(slide, everything(slide), GridConfig())
    mpp = slide.resolution.mpp_x
    for parent in (0, 1):
        pixels = read_parent(slide, grid, parent)
        x_um = grid.parent_coords[parent, 0] * mpp
        assert np.abs(bar_centres_um(pixels.parent[10, :, 1], 2.0, x_um)).max() <= 0.5
        for child, row in zip(pixels.children, range(*grid.children(parent).indices(len(grid))), strict=True):
            if grid.cell[row] < 4:
                found = bar_centres_um(child[40, :, 1], 0.5, grid.coords[row, 0] * mpp)
                assert np.abs(found).max(initial=0) <= 0.5


def test_one_read_serves_both_scales(tmp_path: Path) -> None:
    for mpp in (0.5, 0.25, 0.29):
        picture = ruler(mpp)
        path = write_tiff(tmp_path / f"{mpp}.tif", [picture, box(picture, 4)], mpp)
        with open_slide(path) as slide:
            grid = plan_grid(slide, everything(slide), GridConfig())
            read = read_parent(slide, grid, 0)
            x, y = grid.parent_coords[0]
            direct = slide.read(x, y, 256, 256, 2.0).pixels
            assert np.abs(read.parent.astype(int) - direct).mean() <= 1  # grey level
            if mpp != 0.29:  # there the corner of a child is rounded
                cell = slide.read(*grid.coords[5], 256, 256, 0.5).pixels
                assert np.array_equal(read.children[5], cell)
            mosaic = read.children.reshape(4, 4, 256, 256, 3).swapaxes(1, 2).reshape(1024, 1024, 3)
            assert np.abs(mosaic.reshape(256, 4, 256, 4, 3).mean((1, 3)) - read.parent).max() <= 0.5


def test_a_corrupt_tile_is_counted_in_its_child_and_parent(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [ruler(0.5)], 0.5, "jpeg")
    overwrite(path, tile_bytes(path, 300, 600)[0], bytes(64))
    with open_slide(path) as slide:
        grid = plan_grid(slide, everything(slide), GridConfig())
        read = read_parent(slide, grid, 0)
    assert read.damaged == 1
    assert read.children_valid.tolist() == [1.0] * 6 + [0.0] + [1.0] * 9
    assert (read.children[6] == 128).all()
    assert read.parent_valid == 15 / 16


def test_a_slide_that_is_too_coarse_is_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [ruler(1.0)], 1.0)
    with open_slide(path) as slide, pytest.raises(SlideError, match="must have at most 0.575 µm/px; it has 1 x 1") as e:
        plan_grid(slide, everything(slide), GridConfig())
    assert e.value.code == "too_coarse"


@pytest.mark.parametrize("wrong", [{"mpp": 0}, {"min_tissue": 0}, {"min_tissue": 1.5}, {"edge": "wrap"}])
def test_wrong_settings(wrong: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GridConfig(**wrong)
