from itertools import pairwise

import numpy as np
import pytest

from engine.core.units import BRCA_SCALE, NAIP_SCALE
from engine.sampling.config import CanvasConfig, GuidanceConfig, RefineConfig, RunConfig, SamplingConfig
from engine.sampling.plan import axis_positions, make_plan, make_tiling, pick_levels


@pytest.mark.parametrize("size", [64, 65, 100, 128, 1024, 1023])
@pytest.mark.parametrize("stride", [16, 48, 64])
def test_tiles_cover_the_axis_and_stay_inside(size: int, stride: int) -> None:
    starts = axis_positions(size, stride)
    assert starts[0] == 0
    assert starts[-1] == size - 64
    assert all(0 < b - a <= stride for a, b in pairwise(starts))


def test_batches_hold_every_tile_once_in_row_major_order() -> None:
    tiling = make_tiling(200, 150, 48, 4)
    batches = list(tiling.batches())
    assert [t for b in batches for t in b] == list(range(len(tiling)))
    assert len(batches) == tiling.batch_count
    corners = [tiling.corner(t) for t in range(len(tiling))]
    assert corners == sorted(corners)


def test_finished_rows_are_those_no_later_tile_touches() -> None:
    tiling = make_tiling(200, 150, 48, 4)
    for tile in range(len(tiling)):
        later = [tiling.corner(t)[0] for t in range(tile + 1, len(tiling))]
        assert tiling.finished_rows(tile, 200) == min(later, default=200)


@pytest.mark.parametrize(
    ("edge", "levels"),
    [
        (256, ("20x",)),
        (260, ("10x", "20x")),
        (1024, ("5x", "20x")),
        (4096, ("1.25x", "20x")),
        (8192, ("0.625x", "1.25x", "20x")),
        (32768, ("0.15625x", "1.25x", "20x")),
        (131072, ("0.15625x", "1.25x", "20x")),
    ],
)
def test_a_cascade_ends_at_the_finest_level_that_sees_the_whole_canvas(edge: int, levels: tuple[str, ...]) -> None:
    assert pick_levels(CanvasConfig(256, edge), BRCA_SCALE) == levels


def test_levels_cover_the_canvas_and_the_grid_covers_the_levels() -> None:
    for height, width in ((256, 3000), (1024, 1024), (4100, 700)):
        plan = make_plan(RunConfig(canvas=CanvasConfig(height, width)), NAIP_SCALE)
        for level in plan.levels:
            assert level.height * level.factor * 4 >= height
            assert level.width * level.factor * 4 >= width
            assert level.height * level.factor <= plan.covered_cells[0] * 64
        assert plan.grid_shape == (-(-height // 256), -(-width // 256))


@pytest.mark.parametrize("levels", [("20x", "5x"), ("5x",), ("5x", "5x", "20x"), ("0.15625x", "20x"), ()])
def test_levels_must_run_from_coarse_to_the_base(levels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="canvas.levels must run from coarse to fine"):
        pick_levels(CanvasConfig(1024, 1024, levels), BRCA_SCALE)


def test_one_code_path_expresses_all_recipes() -> None:
    published = RunConfig(
        canvas=CanvasConfig(4096, 4096),
        sampling=SamplingConfig(from_guide=0, tile_stride=64, tile_weights="uniform"),
        guidance=GuidanceConfig(method="newton"),
        refine=RefineConfig(start=300),
    )
    joint, refine = make_plan(published, BRCA_SCALE).passes
    assert len(joint.tilings[-1]) == 256  # 16×16 tiles
    assert len(joint.tilings[0]) == 1
    assert len(joint.steps) == 20
    assert refine.tilings[0] is None
    assert len(refine.tilings[-1]) == 61 * 61
    assert [s.t for s in refine.steps] == [300, 250, 200, 150, 100, 50]
    assert (joint.begins, refine.begins) == ("noise", "latents")
    assert not refine.guided
    predecessor = RunConfig(
        canvas=CanvasConfig(1024, 1024, ("20x",)),
        sampling=SamplingConfig(stride=20, tile_stride=16, tile_weights="uniform", last_step_clean=True),
        guidance=GuidanceConfig(method="none"),
    )
    (panorama,) = make_plan(predecessor, BRCA_SCALE).passes
    assert len(panorama.steps) == 50
    assert np.isclose(panorama.steps[-1].alpha_bar_prev, 1)
