import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from engine.canvas.canvas import Canvas
from engine.core.errors import CanvasError
from engine.core.numerics import keyed_noise
from engine.core.streaming import Workers
from engine.core.units import MagnificationScale
from engine.model.colour_map import LinearColour
from engine.model.zoomldm import ZoomLDM
from engine.parity_checks.activations import SilentCallback
from engine.sampling.config import CanvasConfig, GuidanceConfig, RefineConfig, RunConfig, SamplingConfig
from engine.sampling.denoiser import DenoiseTiles, LocalDenoiser, PointwiseDenoiser, TileBatch, TilePrediction
from engine.sampling.guidance import make_canvas_guidance
from engine.sampling.plan import make_plan
from engine.sampling.sampler import Sampling, sample_large
from tests.support.denoiser_contract import Dying
from tests.support.tiny_run import narrow_config

SAMPLING = SamplingConfig(stride=400, weight=1.0, from_guide=0)
SCALE = MagnificationScale(("20x", "10x", "5x", "2.5x"), 0.5)
DRAW = torch.Generator().manual_seed(0)
LATENTS = torch.randn(4, 3, 64, 64, generator=DRAW)
MAPS = {"guidance/linear": LinearColour.fit(LATENTS, LATENTS.repeat_interleave(4, 2).repeat_interleave(4, 3)).tensors()}


def sampling(folder: Path, config: RunConfig, denoiser: DenoiseTiles, constant: bool = False) -> Sampling:
    plan = make_plan(config, SCALE)
    canvas = Canvas.open(folder, config.picture_keys(), plan.arrays)
    grid = np.random.default_rng(1).standard_normal((16, *plan.grid_shape)).astype(np.float32)
    return Sampling(
        plan=plan,
        canvas=canvas,
        grid=np.broadcast_to(grid[:, :1, :1], grid.shape) if constant else grid,
        denoiser=denoiser,
        guidance=config.guidance,
        canvas_guidance=make_canvas_guidance(config.guidance, MAPS),
        decode_sigma=0.8,
        noise=keyed_noise(config.sampling.seed),
        watch=SilentCallback(),
    )


def sample(folder: Path, config: RunConfig, denoiser: DenoiseTiles, constant: bool = False) -> np.ndarray:
    s = sampling(folder, config, denoiser, constant)
    with s.canvas as canvas:
        sample_large(s)
        return canvas.read("20x", 0, s.plan.finest.height)


@pytest.fixture(scope="module")
def model() -> ZoomLDM:
    torch.manual_seed(0)
    return ZoomLDM(narrow_config()).eval()


def config(method: str = "linear", sampling: SamplingConfig = SAMPLING, **canvas: int) -> RunConfig:
    size = {"height": 384, "width": 600} | canvas
    return RunConfig(
        canvas=CanvasConfig(**size),
        sampling=sampling,
        guidance=GuidanceConfig(method=method, corrections=1),
        refine=RefineConfig(start=200, stride=200, tile_stride=32),
    )


def test_one_tile_is_diffusers_own_loop(tmp_path: Path, model: ZoomLDM) -> None:
    c = replace(config("none", height=256, width=256), refine=RefineConfig(),
                sampling=SamplingConfig(start=1000, stride=200, weight=1.0, batch_size=1))  # fmt: skip
    s = sampling(tmp_path / "run", c, LocalDenoiser(model))
    with s.canvas, torch.inference_mode():
        sample_large(s)
        ours = s.canvas.read("20x", 0, 64)
        context = model.summarize([torch.from_numpy(s.grid[:, :1, :1])], [0])
        theirs = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
                               set_alpha_to_one=False)  # fmt: skip
        theirs.set_timesteps(5)
        x_t = torch.from_numpy(s.noise("start/20x", 0, (0, 64), 64))[None]
        for i, t in enumerate(range(1000, 0, -200)):
            eps = model.predict_eps(x_t, t, context, 1.0)
            noise = torch.from_numpy(s.noise("joint/20x", i, (0, 64), 64))[None]
            # The published recipe takes the one-step beta where DDIM's eta = 1 takes the strided one.
            step = s.plan.passes[0].steps[i]
            ratio = (1 - step.alpha_bar_prev) / (1 - step.alpha_bar) * (1 - step.alpha_bar / step.alpha_bar_prev)
            eta = (step.beta / ratio) ** 0.5
            x_t = theirs.step(eps, t - 1, x_t, eta=eta, variance_noise=noise).prev_sample
    np.testing.assert_allclose(ours, x_t[0].numpy(), atol=1e-3 * np.abs(ours).max())


@pytest.mark.parametrize("method", ["none", "linear"])
def test_where_tiles_agree_the_tiling_does_not_matter(tmp_path: Path, method: str) -> None:
    found = [
        sample(
            tmp_path / str(stride),
            RunConfig(
                canvas=CanvasConfig(300, 500),
                sampling=SamplingConfig(
                    stride=250, from_guide=0, tile_stride=stride, tile_weights=weights, batch_size=batch
                ),
                guidance=GuidanceConfig(method=method),
            ),
            PointwiseDenoiser(),
            constant=True,
        )
        for stride, weights, batch in ((64, "uniform", 1), (48, "smooth", 4), (16, "uniform", 3))
    ]
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)
    np.testing.assert_allclose(found[0], found[2], atol=2e-3)


class Raising:
    """A guidance that raises every latent by one."""

    cell, halo_cells = 1, 0

    def correct(self, x0: torch.Tensor, wished: torch.Tensor, q: int) -> torch.Tensor:
        return x0 + 1


def test_guidance_moves_x0_and_leaves_eps(tmp_path: Path) -> None:
    """After one step the canvas has moved by what the update makes of x0 alone."""
    c = RunConfig(canvas=CanvasConfig(300, 500), sampling=SamplingConfig(stride=1000, from_guide=0))
    plain = sampling(tmp_path / "plain", c, PointwiseDenoiser())
    steered = sampling(tmp_path / "steered", c, PointwiseDenoiser())
    after = []
    for s in (replace(plain, canvas_guidance=None), replace(steered, canvas_guidance=Raising())):
        with s.canvas as canvas:
            sample_large(s)
            after.append({level.name: canvas.read(level.name, 0, level.height) for level in s.plan.levels})
    step = plain.plan.passes[0].steps[0]
    finest, coarsest = plain.plan.finest.name, plain.plan.levels[0].name
    np.testing.assert_allclose(after[1][finest] - after[0][finest], step.alpha_bar_prev**0.5, atol=1e-4)
    assert np.array_equal(after[1][coarsest], after[0][coarsest])


FROM_GUIDE = SamplingConfig(stride=300, weight=1.0, weight_from=700, from_guide=800, solver="dpmpp_2m")


@pytest.mark.parametrize(("method", "how"), [("linear", SAMPLING), ("newton", SAMPLING), ("linear", FROM_GUIDE)])
def test_resumed_equals_uninterrupted(tmp_path: Path, model: ZoomLDM, method: str, how: SamplingConfig) -> None:
    joint = how is SAMPLING
    c = config(method, how, width=400 if joint else 600)
    whole = sample(tmp_path / "whole", c, LocalDenoiser(model))
    for batches in (0, 3, 3, 3) if joint else (0, 5, 4, 3):  # inside a step of each pass, and in the refinement
        with pytest.raises(ConnectionError):
            sample(tmp_path / "cut", c, Dying(LocalDenoiser(model), batches))
    assert np.array_equal(sample(tmp_path / "cut", c, LocalDenoiser(model)), whole)


class ReadingAhead:
    """A denoiser that takes batches before it answers, as a pool does; notes what it had in hand at each answer."""

    def __init__(self, inner: DenoiseTiles, window: int, workers: Workers | None = None) -> None:
        """With `workers` it is so slow that they are always done before it asks for more."""
        self.inner, self.window, self.workers = inner, window, workers or Workers()
        self.seen: list[tuple[str, ...]] = []

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        source, held, more = iter(batches), [], True
        while more or held:
            while not self.workers.idle:
                time.sleep(0.001)
            while more and len(held) < self.window:
                try:
                    batch = next(source)
                except StopIteration:
                    more = False
                    break
                if batch is None:
                    break
                held.append(batch)
            if held:
                self.seen.append(tuple(b.key.rpartition("/")[0] for b in held))
                yield from self.inner.denoise([held.pop(0)])

    def decode(self, batches):
        return self.inner.decode(batches)

    def encode(self, batches):
        return self.inner.encode(batches)


JOINT_2M = replace(SAMPLING, stride=300, solver="dpmpp_2m")


@pytest.mark.parametrize(("method", "how"), [("linear", JOINT_2M), ("newton", SAMPLING), ("linear", FROM_GUIDE)])
def test_reading_ahead_changes_no_byte(tmp_path: Path, model: ZoomLDM, method: str, how: SamplingConfig) -> None:
    c = config(method, how)
    whole = sample(tmp_path / "whole", c, LocalDenoiser(model))
    ahead = ReadingAhead(LocalDenoiser(model), 3)
    assert np.array_equal(sample(tmp_path / "ahead", c, ahead), whole)
    joint = how is not FROM_GUIDE  # its levels are too small to be read ahead by themselves
    assert any(len(set(keys)) > 1 for keys in ahead.seen) == joint  # batches of two levels or steps side by side


def test_the_next_step_begins_before_the_last_tiles_are_in(tmp_path: Path) -> None:
    tall = RunConfig(
        canvas=CanvasConfig(4096, 256, ("20x",)),
        sampling=SamplingConfig(stride=500, tile_stride=64, batch_size=1),
        guidance=GuidanceConfig("none"),
    )
    workers = Workers()
    ahead = ReadingAhead(PointwiseDenoiser(), 10, workers)
    whole = sample(tmp_path / "whole", tall, PointwiseDenoiser())
    s = replace(sampling(tmp_path / "ahead", tall, ahead), workers=workers)
    with s.canvas as canvas:
        sample_large(s)
        assert np.array_equal(canvas.read("20x", 0, s.plan.finest.height), whole)
    assert any({"joint/t=1000/20x", "joint/t=500/20x"} <= set(keys) for keys in ahead.seen)


def test_a_level_is_one_step_ahead_of_the_next_finer_one(tmp_path: Path) -> None:
    """So that the picture that steers is decoded while the finer level is at work."""
    c = RunConfig(canvas=CanvasConfig(300, 500), sampling=SamplingConfig(stride=250, from_guide=0))
    ahead = ReadingAhead(PointwiseDenoiser(), 1)
    sample(tmp_path / "run", c, ahead)
    assert list(dict.fromkeys(keys[0] for keys in ahead.seen)) == [
        "joint/t=1000/10x",
        *("joint/t=750/10x", "joint/t=1000/20x"),
        *("joint/t=500/10x", "joint/t=750/20x"),
        *("joint/t=250/10x", "joint/t=500/20x"),
        "joint/t=250/20x",
    ]


@pytest.mark.parametrize("at", [1, 6, 11])
def test_a_disk_that_refuses_a_band_stops_the_run_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Bands are written in threads; what is committed stays whole, and the run goes on to the same bytes."""
    tall = RunConfig(
        canvas=CanvasConfig(4096, 256, ("20x",)),
        sampling=SamplingConfig(stride=500, tile_stride=64, batch_size=1),
        guidance=GuidanceConfig("none"),
    )
    whole = sample(tmp_path / "whole", tall, PointwiseDenoiser())
    write, calls = Canvas.write, []

    def refusing(self: Canvas, level: str, y0: int, rows: np.ndarray) -> None:
        calls.append(y0)
        if len(calls) == at:
            raise CanvasError("the disk is full")
        write(self, level, y0, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Canvas, "write", refusing)
        with pytest.raises(CanvasError, match="the disk is full"):
            sample(tmp_path / "cut", tall, PointwiseDenoiser())
    assert np.array_equal(sample(tmp_path / "cut", tall, PointwiseDenoiser()), whole)


@pytest.mark.parametrize(("a", "b"), [("none", "linear"), ("none", "newton")])
def test_guidance_changes_the_picture(tmp_path: Path, model: ZoomLDM, a: str, b: str) -> None:
    small = [replace(config(m, height=256, width=320), refine=RefineConfig()) for m in (a, b)]
    first, second = (sample(tmp_path / m, c, LocalDenoiser(model)) for m, c in zip((a, b), small, strict=True))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("change", [{"seed": 1}, {"weight": 0.0}])
def test_every_sampling_input_changes_the_picture(tmp_path: Path, model: ZoomLDM, change: dict[str, float]) -> None:
    base = replace(config("none", height=256, width=256), refine=RefineConfig())
    other = replace(base, sampling=replace(base.sampling, **change))
    first = sample(tmp_path / "a", base, LocalDenoiser(model))
    assert np.abs(first - sample(tmp_path / "b", other, LocalDenoiser(model))).max() > 1e-3


def test_every_cell_of_the_grid_changes_the_picture(tmp_path: Path, model: ZoomLDM) -> None:
    c = RunConfig(canvas=CanvasConfig(256, 512), sampling=SamplingConfig(stride=500), guidance=GuidanceConfig("none"))
    pictures = []
    for column in (None, 0, 1):
        s = sampling(tmp_path / str(column), c, LocalDenoiser(model))
        if column is not None:
            s.grid[:, 0, column] *= -1
        with s.canvas:
            sample_large(s)
            pictures.append(s.canvas.read("20x", 0, 64))
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-4
    assert np.abs(pictures[0] - pictures[2]).max() > 1e-4
