"""A run seen while it works: x0 of one commit, whole or a region, without its lock and without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.canvas.canvas import Canvas
from engine.canvas.view import CanvasView
from engine.core.errors import CanvasError
from engine.core.numerics import keyed_noise
from engine.core.streaming import Box
from engine.core.units import MagnificationScale
from engine.generation import preview
from engine.generation.preview import Reach, copy_latents, picture_rows
from engine.parity_checks.activations import SilentCallback
from engine.sampling.config import CanvasConfig, DecodeConfig, GuidanceConfig, RefineConfig, RunConfig, SamplingConfig
from engine.sampling.denoiser import PointwiseDenoiser
from engine.sampling.pixels import to_uint8
from engine.sampling.plan import Plan, make_plan
from engine.sampling.sampler import Sampling, sample_large

HEIGHT, WIDTH = 1203, 902
WHOLE = Box(0, 0, HEIGHT, WIDTH)
CONFIG = RunConfig(
    canvas=CanvasConfig(HEIGHT, WIDTH),
    sampling=SamplingConfig(stride=250, from_guide=0, batch_size=3),
    guidance=GuidanceConfig("none"),
    refine=RefineConfig(start=200, stride=200, tile_stride=40),
    decode=DecodeConfig(tile_stride=40),
)
PLAN = make_plan(CONFIG, MagnificationScale(("20x", "10x", "5x"), 0.5))


class Stopped(Exception):
    """Raised by a watch, to leave a run in the middle."""


class Stopping(SilentCallback):
    """Lets a run do so many steps, renoising included."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def step(self, name: str, done: int, total: int) -> None:
        if self.left == 0:
            raise Stopped
        self.left -= 1


def grid_of(plan: Plan) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, *plan.covered_cells)).astype(np.float32) / 2


def sampling(canvas: Canvas, calls: int) -> Sampling:
    return Sampling(
        PLAN, canvas, grid_of(PLAN), PointwiseDenoiser(), CONFIG.guidance, None, 0.5, keyed_noise(0), Stopping(calls)
    )


@contextmanager
def working(folder: Path, calls: int) -> Iterator[Canvas]:
    """A run in the middle, its lock held. `calls`: 0 = noise; 1..4 steps; then renoised, refined, finished."""
    with Canvas.open(folder, CONFIG.picture_keys(), {n.name: (n.height, n.width) for n in PLAN.levels}) as canvas:
        if calls < 7:
            with pytest.raises(Stopped):
                sample_large(sampling(canvas, calls))
        else:
            sample_large(sampling(canvas, 99))
        yield canvas


def seen(folder: Path, scratch: Path, region: Box) -> np.ndarray:
    state, canvas = copy_latents(folder, PLAN, region, scratch)
    with canvas:
        rows = picture_rows(sampling(canvas, 0), Reach.of(PLAN, state, region), region)
        return np.concatenate(list(rows), axis=1)


@pytest.mark.parametrize(("calls", "gain"), [(0, 0.5), (3, 0.5), (5, 0.5), (7, 1.0)])
def test_shows_x0_of_the_latents_where_conditions_agree(tmp_path: Path, calls: int, gain: float,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(f"{__name__}.grid_of", lambda plan: np.full((4, *plan.covered_cells), 0.1, np.float32))
    with working(tmp_path / "run", calls) as canvas:
        x_t = canvas.read("20x", 0, PLAN.finest.height)
        x0 = gain * x_t + (0.1 if gain < 1 else 0)
        expected = to_uint8(x0.repeat(4, 1).repeat(4, 2)[:, :HEIGHT, :WIDTH])
        found = seen(tmp_path / "run", tmp_path / "scratch", WHOLE)
    assert found.shape == (3, HEIGHT, WIDTH)
    assert np.abs(found.astype(int) - expected).max() <= 1  # equal windows are averaged


@pytest.mark.parametrize(
    "region", [Box(0, 0, 1, 1), Box(733, 550, 1000, 901), Box(1200, 898, 1203, 902), Box(5, 0, 1000, 902)]
)
@pytest.mark.parametrize("calls", [2, 5])
def test_a_region_is_what_the_whole_shows_there(tmp_path: Path, region: Box, calls: int) -> None:
    with working(tmp_path / "run", calls):
        whole = seen(tmp_path / "run", tmp_path / "a", WHOLE)
        part = seen(tmp_path / "run", tmp_path / "b", region)
    np.testing.assert_array_equal(part, whole[:, region.y0 : region.y1, region.x0 : region.x1])


def test_a_region_costs_its_own_tiles_alone(tmp_path: Path) -> None:
    with working(tmp_path / "run", 2) as canvas:
        state, copied = copy_latents(tmp_path / "run", PLAN, Box(0, 0, 10, 10), tmp_path / "scratch")
        copied.close()
    reach = Reach.of(PLAN, state, Box(0, 0, 10, 10))
    assert reach.tiling is not None
    assert len(reach.tiling) < len(PLAN.passes[0].tilings[-1] or ()) / 3
    assert copied.levels["20x"] == reach.latents.size
    assert np.prod(reach.latents.size) < np.prod(canvas.levels["20x"]) / 2


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_in_the_run_folder_changes(tmp_path: Path) -> None:
    with working(tmp_path / "run", 2):
        before = files(tmp_path / "run")
        seen(tmp_path / "run", tmp_path / "scratch", WHOLE)
        assert files(tmp_path / "run") == before


class Overtaken(CanvasView):
    """A worker commits two more steps, and so overwrites what is being read, the first times it is read."""

    times = 0
    worker: Canvas

    def read(self, level: str, y0: int, y1: int) -> np.ndarray:
        if Overtaken.times and y0 > 0:
            Overtaken.times -= 1
            steps = self.worker.progress.steps
            for step in (steps + 1, steps + 2):
                for name, (height, width) in self.worker.levels.items():
                    for top in range(0, height, 256):
                        rows = np.full((3, min(256, height - top), width), step / 10, np.float32)
                        self.worker.write(name, top, rows)
                self.worker.commit(0, step)
        return super().read(level, y0, y1)


@pytest.mark.parametrize("times", [1, 9])
def test_a_commit_under_the_copy_is_noticed(tmp_path: Path, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "CanvasView", Overtaken)
    with working(tmp_path / "run", 0) as worker:
        monkeypatch.setattr(Overtaken, "worker", worker, raising=False)
        monkeypatch.setattr(Overtaken, "times", times)
        plan = replace(PLAN, passes=(replace(PLAN.passes[0], steps=PLAN.passes[0].steps * 9), *PLAN.passes[1:]))
        state, canvas = copy_latents(tmp_path / "run", plan, WHOLE, tmp_path / "scratch")
        with canvas:
            assert state.progress.steps == 2 * times
            assert (canvas.read("20x", 0, PLAN.finest.height) == np.float32(2 * times / 10)).all()


def test_a_run_that_is_always_faster_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "CanvasView", Overtaken)
    with working(tmp_path / "run", 0) as worker:
        monkeypatch.setattr(Overtaken, "worker", worker, raising=False)
        monkeypatch.setattr(Overtaken, "times", 99)
        plan = replace(PLAN, passes=(replace(PLAN.passes[0], steps=PLAN.passes[0].steps * 9), *PLAN.passes[1:]))
        with pytest.raises(CanvasError, match="must stand still .* 10 times"):
            copy_latents(tmp_path / "run", plan, WHOLE, tmp_path / "scratch")


def test_damage_and_an_empty_canvas_are_errors(tmp_path: Path) -> None:
    levels = {n.name: (n.height, n.width) for n in PLAN.levels}
    with (
        Canvas.open(tmp_path / "new", CONFIG.picture_keys(), levels),
        pytest.raises(CanvasError, match="must have committed latents of level 20x; it has none yet"),
    ):
        copy_latents(tmp_path / "new", PLAN, WHOLE, tmp_path / "a")
    with working(tmp_path / "run", 2):
        for chunk in (tmp_path / "run").glob("canvas.zarr/20x/latent_*/c/0/1/0"):
            chunk.unlink()
        with pytest.raises(CanvasError, match=r"rows 256\.\.301 of level 20x must be whole"):
            copy_latents(tmp_path / "run", PLAN, WHOLE, tmp_path / "b")
