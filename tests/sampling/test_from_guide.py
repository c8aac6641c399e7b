"""Finer levels that begin from the picture of a coarser one: the plan, the beginning, the solver, the null calls."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from engine.canvas.canvas import Canvas
from engine.core.errors import CanvasMismatchError
from engine.core.numerics import box_reduce, keyed_noise
from engine.core.units import MagnificationScale
from engine.generation.cost import pass_calls
from engine.model.colour_map import LinearColour
from engine.parity_checks.activations import SilentCallback
from engine.sampling.config import CanvasConfig, GuidanceConfig, RefineConfig, RunConfig, SamplingConfig
from engine.sampling.denoiser import PointwiseDenoiser, TileBatch, TilePrediction
from engine.sampling.guidance import GuidePicture, LinearGuidance, make_canvas_guidance, steer_rows
from engine.sampling.pixels import enlarged_latents
from engine.sampling.plan import from_guide, make_plan, x0_name
from engine.sampling.sampler import Sampling, guide_of, sample_large
from engine.sampling.schedule import steps

SCALE = MagnificationScale(("20x", "10x", "5x", "2.5x", "1.25x"), 0.5)
PLAIN = LinearColour(torch.eye(3).double(), torch.zeros(3).double())


def config_of(**sampling: object) -> RunConfig:
    settings = {"stride": 300, "from_guide": 600, "weight": 1.0} | sampling
    return RunConfig(
        canvas=CanvasConfig(384, 640),
        sampling=SamplingConfig(**settings),  # type: ignore[arg-type]
        guidance=GuidanceConfig("none"),
    )


class Recording(PointwiseDenoiser):
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[TileBatch] = []

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        def noted() -> Iterator[TileBatch | None]:
            for batch in batches:
                if batch is not None:
                    self.asked.append(batch)
                yield batch

        return super().denoise(noted())


def sampling(folder: Path, config: RunConfig, denoiser: PointwiseDenoiser) -> Sampling:
    plan = make_plan(config, SCALE)
    return Sampling(
        plan=plan,
        canvas=Canvas.open(folder, config.picture_keys(), plan.arrays),
        grid=np.random.default_rng(1).standard_normal((4, *plan.grid_shape)).astype(np.float32),
        denoiser=denoiser,
        guidance=config.guidance,
        canvas_guidance=make_canvas_guidance(config.guidance, {"guidance/linear": PLAIN.tensors()}),
        decode_sigma=0.5,
        noise=keyed_noise(0),
        watch=SilentCallback(),
    )


def test_levels_are_sampled_one_after_the_other() -> None:
    large = RunConfig(canvas=CanvasConfig(8192, 8192, ("1.25x", "5x", "20x")), refine=RefineConfig(start=100))
    passes = make_plan(large, SCALE).passes
    assert [(p.name, p.begins, p.guided) for p in passes] == [
        ("1.25x", "noise", False), ("5x", "guide", True), ("20x", "guide", True), ("refine", "latents", False),
    ]  # fmt: skip
    assert [p.steps[0].t for p in passes] == [1000, 600, 600, 100]
    assert [[t is not None for t in p.tilings] for p in passes[:3]] == np.eye(3, dtype=bool).tolist()
    assert len(make_plan(RunConfig(sampling=SamplingConfig(from_guide=0)), SCALE).passes) == 1


@pytest.mark.parametrize(("levels", "begins"), [(("5x", "20x"), 600), (("2.5x", "20x"), 700), (("1.25x", "20x"), 700)])
def test_a_coarser_guide_is_begun_from_earlier(levels: tuple[str, ...], begins: int) -> None:
    config = RunConfig(canvas=CanvasConfig(1024, 1024, levels))
    plan = make_plan(config, SCALE)
    assert plan.passes[1].steps[0].t == from_guide(config, plan.levels) == begins


def test_one_level_has_no_guide_to_begin_from() -> None:
    alone = CanvasConfig(256, 256)
    assert [p.name for p in make_plan(RunConfig(canvas=alone), SCALE).passes] == ["joint"]
    with pytest.raises(ValueError, match="from_guide=500 needs a guide.*20x alone.*from_guide=0"):
        make_plan(RunConfig(canvas=alone, sampling=SamplingConfig(from_guide=500)), SCALE)


def test_a_level_begins_from_the_enlarged_picture_noised(tmp_path: Path) -> None:
    denoiser = Recording()
    s = sampling(tmp_path, config_of(), denoiser)
    with s.canvas:
        sample_large(s)
        guide = guide_of(s, s.plan.passes[1])
    assert guide is not None
    assert guide.ratio == 4
    fine = s.plan.finest
    tiling = s.plan.passes[1].tilings[-1]
    assert tiling is not None
    size = (fine.height, fine.width)
    clean = np.concatenate(list(enlarged_latents(guide, tiling, size, denoiser, "")), axis=1)
    step = s.plan.passes[1].steps[0]
    x_t = step.renoise(clean, s.noise("start/20x", 0, (0, fine.height), fine.width))
    first = next(b for b in denoiser.asked if b.key.startswith("20x/t=600/"))
    for tile, found in zip(first.tiles, first.x_t, strict=False):
        y, x = tiling.corner(tile)
        np.testing.assert_array_equal(found, x_t[:, y : y + 64, x : x + 64])
    seen = guide.image[:, : fine.height, : fine.width]  # a guide px is a latent px here
    inside = np.abs(seen) < 0.5  # at white and black the enlarged picture is clipped
    np.testing.assert_allclose(clean[inside], seen[inside], atol=0.02)


@pytest.mark.parametrize(("first", "last", "expected"), [(1000, 1, 4), (600, 1, 2), (1000, 600, 2), (300, 1, 1)])
def test_the_null_call_is_made_in_its_range_alone(tmp_path: Path, first: int, last: int, expected: int) -> None:
    c = config_of(weight_from=first, weight_to=last, from_guide=0)
    denoiser = Recording()
    s = sampling(tmp_path, c, denoiser)
    with s.canvas:
        sample_large(s)
    weighted = {b.timestep for b in denoiser.asked if b.weight}
    assert len(weighted) == expected
    assert all(last <= t <= first for t in weighted)
    asked = sum(len(b.x_t) * (2 if b.weight else 1) for b in denoiser.asked)
    assert pass_calls(s.plan, s.plan.passes[0], c).unet == asked


def test_the_second_order_is_diffusers_own() -> None:
    """A network whose x0 changes with t, on the same timesteps: the solver's answer is the library's."""
    ours = steps(1000, 125, solver="dpmpp_2m")
    theirs = DPMSolverMultistepScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", algorithm_type="dpmsolver++",
        solver_order=2, lower_order_final=True, final_sigmas_type="sigma_min",
    )  # fmt: skip
    theirs.set_timesteps(timesteps=[s.t - 1 for s in ours])
    draw = np.random.default_rng(0)
    x_t, target = draw.standard_normal((2, 3, 8, 8)).astype(np.float32)
    x_theirs, before = torch.from_numpy(x_t)[None], None
    for step in ours:
        eps = np.sin(target + step.t / 300) + 0.3 * x_t
        x0 = (x_t - (1 - step.alpha_bar) ** 0.5 * eps) / step.alpha_bar**0.5
        x_theirs = theirs.step(torch.from_numpy(eps)[None], step.t - 1, x_theirs).prev_sample
        x_t = step.update(x0, eps, None, before if step.trend else None)
        before = x0
        np.testing.assert_allclose(x_t, x_theirs[0].numpy(), rtol=2e-3, atol=2e-3)
    assert sum(step.trend > 0 for step in ours) == len(ours) - 2


def test_x0_is_kept_on_the_canvas_only_where_the_solver_asks(tmp_path: Path) -> None:
    assert list(make_plan(config_of(), SCALE).arrays) == ["5x", "20x"]
    assert list(make_plan(config_of(solver="dpmpp_2m", from_guide=0), SCALE).arrays) == [
        "5x", "20x", x0_name("5x"), x0_name("20x"),
    ]  # fmt: skip
    # one step of the finest: nothing to remember there
    assert list(make_plan(config_of(solver="dpmpp_2m", from_guide=300), SCALE).arrays) == ["5x", "20x", x0_name("5x")]


@pytest.mark.parametrize("change", [{"solver": "dpmpp_2m"}, {"from_guide": 500}, {"weight_to": 400}])
def test_another_solver_does_not_continue_a_run(tmp_path: Path, change: dict[str, object]) -> None:
    s = sampling(tmp_path, config_of(), PointwiseDenoiser())
    with s.canvas:
        sample_large(s)
    with pytest.raises(CanvasMismatchError, match=f"sampling.{next(iter(change))} was"):
        sampling(tmp_path, config_of(**change), PointwiseDenoiser())


def test_steering_coarse_cells_leaves_finer_patterns() -> None:
    draw = np.random.default_rng(0)
    x0 = draw.standard_normal((3, 64, 64)).astype(np.float32)
    guide = GuidePicture(draw.uniform(-1, 1, (3, 64, 60)).astype(np.float32), 4)

    def cells(latents: np.ndarray) -> np.ndarray:
        return box_reduce(torch.from_numpy(latents)[None], 8).numpy()[0]

    def detail(latents: np.ndarray) -> np.ndarray:
        return np.diff(latents[:, ::8] - latents[:, 4::8], axis=2)[:, :, ::8]

    moved = {c: steer_rows(LinearGuidance(PLAIN, 1.0, 0.05, c), x0, (0, 0, 64), guide) for c in (1, 8)}
    missing = cells(guide.image[:, :, :56]) - cells(x0)[:, :, :7]
    left = cells(guide.image[:, :, :56]) - cells(moved[8])[:, :, :7]
    assert np.abs(left).mean() < 0.6 * np.abs(missing).mean()
    assert np.abs(detail(moved[8] - x0)).mean() < 0.2 * np.abs(detail(moved[1] - x0)).mean()
