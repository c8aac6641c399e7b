"""A window in a finished picture: its tiles, its rim, and what its sampling keeps."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.canvas.canvas import Canvas
from engine.core.numerics import keyed_noise
from engine.core.streaming import Box
from engine.core.units import MagnificationScale
from engine.generation.inpaint_region import (
    RIM,
    RIM_PX,
    OldPicture,
    Window,
    laid_over,
    mix,
    window_plan,
    window_under,
)
from engine.model.colour_map import LinearColour
from engine.parity_checks.activations import SilentCallback
from engine.sampling.config import CanvasConfig, GuidanceConfig, RefineConfig, RunConfig, SamplingConfig
from engine.sampling.denoiser import (
    DecodeBatch,
    DecodedBatch,
    DenoiseTiles,
    PointwiseDenoiser,
    TileBatch,
    TilePrediction,
)
from engine.sampling.guidance import GuidePicture, LinearGuidance, halo_rows, make_canvas_guidance, steer_rows
from engine.sampling.plan import Plan, make_plan
from engine.sampling.sampler import Sampling, sample_large

SCALE = MagnificationScale(("20x", "10x", "5x", "2.5x"), 0.5)
HEIGHT, WIDTH = 1203, 902
REGIONS = [Box(0, 0, 1, 1), Box(300, 410, 500, 430), Box(1000, 800, 1203, 902), Box(0, 0, HEIGHT, WIDTH)]
MATRIX = LinearColour(torch.eye(3).double(), torch.zeros(3).double())


def config_of(stride: int = 48, refine: int = 0, method: str = "linear") -> RunConfig:
    return RunConfig(
        canvas=CanvasConfig(HEIGHT, WIDTH),
        sampling=SamplingConfig(stride=200, from_guide=0, tile_stride=stride, last_step_clean=True),
        guidance=GuidanceConfig(method, to_t=1, strength=1.0, cell=1),  # type: ignore[arg-type]
        refine=RefineConfig(start=refine, stride=100),
    )


def plan_of(stride: int = 48, refine: int = 0) -> Plan:
    return make_plan(config_of(stride, refine), SCALE)


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("stride", [16, 48, 61, 64])
def test_the_window_holds_every_touched_tile_and_a_rim(region: Box, stride: int) -> None:
    plan = plan_of(stride)
    tiling, window = window_under(plan, region)
    box, under = window.box, region.latent()
    whole = plan.passes[0].tilings[-1]
    assert whole is not None
    corners = {whole.corner(t) for t in range(len(whole))}
    inside = {(y + box.y0, x + box.x0) for y, x in map(tiling.corner, range(len(tiling)))}
    touched = {(y, x) for y, x in corners if y < under.y1 and y + 64 > under.y0 and x < under.x1 and x + 64 > under.x0}
    assert touched <= inside <= corners
    assert box.y0 == 0 or under.y0 - box.y0 >= RIM
    assert box.x0 == 0 or under.x0 - box.x0 >= RIM
    assert box.y1 == plan.finest.height or box.y1 - under.y1 >= RIM
    assert box.x1 == plan.finest.width or box.x1 - under.x1 >= RIM
    assert (window.share(under) == 1).all()


def test_the_rim_fades_towards_the_old_alone() -> None:
    window = Window(Box(0, 100, 90, 200), (300, 200))
    share = window.share(window.box)[0]
    assert (share[:-RIM, RIM:] == 1).all()  # the top and right borders are the picture's own
    assert (np.diff(share[-RIM:, -1]) < 0).all()
    assert (np.diff(share[0, :RIM]) > 0).all()
    assert 0 < share[-1, -1] < 0.01
    part = Box(60, 110, 80, 150)
    np.testing.assert_array_equal(window.share(part)[0], share[60:80, 10:50])
    px = window.pixels((1199, 798))
    assert (px.box, px.size, px.rim) == (Box(0, 400, 360, 798), (1199, 798), RIM_PX)


def test_mixing_keeps_both_ends_to_the_bit() -> None:
    old, new = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    share = np.zeros((1, 4, 5), np.float32)
    share[:, :2] = 1
    mixed = mix(old, new, share)
    assert mixed.dtype == np.float32
    np.testing.assert_array_equal(mixed[:, :2], new[:, :2])
    np.testing.assert_array_equal(mixed[:, 2:], old[:, 2:])


def test_laying_over_changes_the_window_alone() -> None:
    level, new = np.zeros((3, 300, 200), np.float32), np.ones((3, 90, 100), np.float32)
    window = Window(Box(0, 100, 90, 200), (300, 200))
    whole = laid_over(level, Box(0, 0, 300, 200), window, lambda y0, y1, x0, x1: new[:, y0:y1, x0:x1])
    np.testing.assert_array_equal(whole[0, :90, 100:], window.share(window.box)[0])
    assert not whole[:, 90:].any()
    assert not whole[:, :, :100].any()
    assert not level.any()
    for box in (Box(50, 20, 130, 160), Box(100, 0, 120, 200), Box(10, 150, 20, 160)):
        part = laid_over(
            level[:, box.y0 : box.y1, box.x0 : box.x1], box, window, lambda *at: new[:, at[0] : at[1], at[2] : at[3]]
        )
        np.testing.assert_array_equal(part, whole[:, box.y0 : box.y1, box.x0 : box.x1])


def test_steps_begin_at_the_timestep_asked_for() -> None:
    plan = window_plan(plan_of(refine=300), REGIONS[1], 650)
    assert [[s.t for s in p.steps] for p in plan.passes] == [[600, 400, 200], [300, 200, 100]]
    assert [[s.t for s in p.steps] for p in window_plan(plan_of(refine=300), REGIONS[1], 200).passes] == [
        [200],
        [200, 100],
    ]
    beginning = replace(config_of(), sampling=SamplingConfig(from_guide=600, stride=200))
    later = window_plan(make_plan(beginning, SCALE), REGIONS[1], 400)
    assert [(p.name, p.begins, [s.t for s in p.steps]) for p in later.passes] == [("20x", "latents", [400, 200])]
    for t in (199, 1001):
        with pytest.raises(ValueError, match=rf"from_t must lie in 200\.\.1000.*got {t}"):
            window_plan(plan_of(), REGIONS[1], t)


class Oracle(PointwiseDenoiser):
    """Predicts what lies under each tile, of a level's latents (3, h, w)."""

    def __init__(self, plan: Plan, truth: np.ndarray) -> None:
        super().__init__()
        self.plan, self.truth = plan, truth

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        tilings = {p.name: p.tilings[-1] for p in self.plan.passes}
        for batch in batches:
            assert batch is not None
            tiling = tilings[batch.key.partition("/")[0]]
            assert tiling is not None
            corners = [
                tiling.corner(t) for t in (*batch.tiles, *batch.tiles[-1:] * (len(batch.x_t) - len(batch.tiles)))
            ]
            x0 = np.stack([self.truth[:, y : y + 64, x : x + 64] for y, x in corners])
            eps = (batch.x_t - batch.alpha_bar**0.5 * x0) / (1 - batch.alpha_bar) ** 0.5
            yield TilePrediction(batch.key, x0, eps.astype(np.float32) if batch.newton is not None else None)

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        raise AssertionError


def sampled(
    folder: Path, config: RunConfig, denoiser_of: type[Oracle] | None, truth: np.ndarray, guide: bool, region: Box
) -> tuple[np.ndarray, Window]:
    """Sample a window of old latents 2.0 and return it whole."""
    whole = make_plan(config, SCALE)
    plan = window_plan(whole, region, 1000)
    _, window = window_under(whole, region)
    h, w = window.box.size
    denoiser: DenoiseTiles = denoiser_of(plan, truth) if denoiser_of else PointwiseDenoiser()
    picture = np.full((3, 200, 200), 0.5, np.float32)
    around = OldPicture(window, lambda y0, y1: np.full((3, y1 - y0, w), 2.0, np.float32))
    with Canvas.open(folder, {}, {"20x": (h, w)}) as canvas:
        s = Sampling(
            plan=plan,
            canvas=canvas,
            grid=np.zeros((4, *whole.grid_shape), np.float32),
            denoiser=denoiser,
            guidance=config.guidance,
            canvas_guidance=make_canvas_guidance(config.guidance, {"guidance/linear": MATRIX.tensors()}),
            decode_sigma=0.5,
            noise=keyed_noise(0),
            watch=SilentCallback(),
            guide=GuidePicture(picture, 16, (window.box.y0 % 4, window.box.x0 % 4)) if guide else None,
            around=around,
        )
        sample_large(s)
        return canvas.read("20x", 0, h), window


@pytest.mark.parametrize("method", ["none", "newton"])
@pytest.mark.parametrize("region", REGIONS[1:3])
def test_tiles_outside_predict_what_was(tmp_path: Path, method: str, region: Box) -> None:
    """A network that predicts 1 beside latents of 2: a window ends as one in the middle, and as two at its rim."""
    _, window = window_under(plan_of(), region)
    truth = np.ones((3, *window.box.size), np.float32)
    found, _ = sampled(tmp_path, config_of(method=method), Oracle, truth, method == "newton", region)
    expected = 2 - np.broadcast_to(window.share(window.box), found.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_guidance_reaches_as_far_as_the_new(tmp_path: Path) -> None:
    region = REGIONS[1]
    _, window = window_under(plan_of(), region)
    truth = np.full((3, *window.box.size), 2.0, np.float32)
    found, _ = sampled(tmp_path, config_of(), Oracle, truth, True, region)
    share = window.share(window.box)
    inner = np.broadcast_to(share == 1, found.shape)
    assert np.abs(found[inner] - 2).min() > 0.5  # pulled to 0.5, damped
    moved = (2 - found) / (2 - found[inner].mean())
    np.testing.assert_allclose(moved, np.broadcast_to(share, found.shape), atol=0.02)


def test_refinement_keeps_the_rim_too(tmp_path: Path) -> None:
    truth = np.full((3, *window_under(plan_of(), REGIONS[2])[1].box.size), 1.0, np.float32)
    config = config_of(refine=300, method="none")
    found, window = sampled(tmp_path, config, Oracle, truth, False, REGIONS[2])
    # the refinement's last step leaves training step 0's noise
    expected = 2 - np.broadcast_to(window.share(window.box), found.shape)
    assert np.abs(found - expected).mean() < 0.05


@pytest.mark.parametrize(("cell", "offset"), [(1, (0, 0)), (1, (3, 1)), (4, (1, 2)), (8, (7, 5))])
def test_a_window_is_steered_as_the_whole_is(cell: int, offset: tuple[int, int]) -> None:
    draw = np.random.default_rng(0)
    x0 = draw.standard_normal((3, 160, 96)).astype(np.float32)
    picture = draw.uniform(-1, 1, (3, 40, 24)).astype(np.float32)
    guidance = LinearGuidance(MATRIX, strength=1.0, damping=0.1, cell=cell)
    whole = steer_rows(guidance, x0, (0, 0, 160), GuidePicture(picture, 16))
    cy, cx = 8, 6
    top, left = 4 * cy + offset[0], 4 * cx + offset[1]
    guide = GuidePicture(picture[:, cy:, cx:], 16, offset)
    halo = halo_rows(guidance, guide)
    window = x0[:, top:, left:]
    rows = window[:, 32 - halo : 64 + halo]
    part = steer_rows(guidance, np.ascontiguousarray(rows), (32 - halo, 32, 64), guide)
    np.testing.assert_allclose(part[:, :, 16:-16], whole[:, top + 32 : top + 64, left + 16 : -16], atol=1e-6)
    square = GuidePicture(picture, 16).square(4 * top + 20, 4 * left + 8, 4)
    np.testing.assert_allclose(guide.square(20, 8, 4), square, atol=1e-6)


def test_another_tiling_of_the_window_changes_nothing_where_tiles_agree(tmp_path: Path) -> None:
    found = []
    for number, stride in enumerate((48, 64)):
        config = replace(
            config_of(method="none"), sampling=SamplingConfig(stride=250, from_guide=0, tile_stride=stride)
        )
        region = Box(0, 0, HEIGHT, WIDTH)
        found.append(sampled(tmp_path / str(number), config, None, np.zeros(0), False, region)[0])
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)
