"""A run without its command: a model in memory and made-up SSL vectors, sampled and decoded in a folder.

What costs time and memory is all there (canvas, guide, noise, averaging, decoding, pyramid); what a picture is worth
is not. It imports no Ray: who computes is the caller's choice.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.canvas.canvas import Canvas
from engine.core.cli import PROJECT_ROOT, parse
from engine.core.numerics import keyed_noise
from engine.core.runtime import settle_dtype, this_process
from engine.core.units import MagnificationScale
from engine.generation import outputs
from engine.generation.guidance_fit import Maps, fit_map
from engine.generation.session import TimedDenoiser
from engine.images.ome_zarr import BAND_PX, Image
from engine.model.zoomldm import ZoomLDM
from engine.parity_checks.activations import SilentCallback
from engine.sampling.config import RunConfig
from engine.sampling.denoiser import DenoiseTiles
from engine.sampling.guidance import make_canvas_guidance
from engine.sampling.plan import Plan, make_plan
from engine.sampling.sampler import Sampling, sample_large


def demo_config(size: int, settings: Mapping[str, object]) -> RunConfig:
    """Return configs/demo.yaml with another size in px and further keys ("sampling.stride": 50), dtype settled."""
    changes = {"canvas.height": size, "canvas.width": size} | dict(settings)
    flags = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    config = parse(["--config", str(PROJECT_ROOT / "configs" / "demo.yaml"), *flags], RunConfig, "benchmarks", "")
    dtype = settle_dtype(config.model.dtype, lambda: None, this_process(config.model.device))
    return replace(config, model=replace(config.model, dtype=dtype))  # type: ignore[arg-type]  # one of the key's


@dataclass(frozen=True)
class Timing:
    """Seconds of one run's parts, and how much of the first two went by waiting for the denoiser."""

    sampling_s: float
    decoding_s: float
    sampling_waited_s: float
    decoding_waited_s: float

    @property
    def wall_s(self) -> float:
        return self.sampling_s + self.decoding_s


@dataclass(frozen=True)
class BareRun:
    """What a run is about; everything but who computes, and where."""

    config: RunConfig
    scale: MagnificationScale
    plan: Plan
    grid: np.ndarray
    """float32 (D, h, w)."""
    maps: Maps
    """The guidance map "guidance/linear", where the method needs it."""

    @classmethod
    def of(cls, config: RunConfig, scale: MagnificationScale, ssl_dim: int, maps: Maps) -> "BareRun":
        """Cut the plan and make up vectors for its cells."""
        plan = make_plan(config, scale)
        grid = np.random.default_rng(0).standard_normal((ssl_dim, *plan.grid_shape), dtype=np.float32)
        return cls(config, scale, plan, grid, maps)

    def first_steps(self, count: int) -> "BareRun":
        """Return the same run, ended after `count` steps of each pass."""
        passes = tuple(replace(p, steps=p.steps[:count]) for p in self.plan.passes)
        return replace(self, plan=replace(self.plan, passes=passes))

    def open(self, folder: Path, denoiser: DenoiseTiles) -> Sampling:
        """Make the canvas; leave with `with sampling.canvas`."""
        guided = any(p.guided for p in self.plan.passes)
        return Sampling(
            plan=self.plan,
            canvas=Canvas.open(folder, self.config.picture_keys(), self.plan.arrays),
            grid=self.grid,
            denoiser=denoiser,
            guidance=self.config.guidance,
            canvas_guidance=make_canvas_guidance(self.config.guidance, self.maps) if guided else None,
            decode_sigma=self.config.decode.sigma,
            noise=keyed_noise(self.config.sampling.seed),
            watch=SilentCallback(),
        )

    def go(self, folder: Path, denoiser: DenoiseTiles, after: Callable[[str], object] = str) -> Timing:
        """Sample and decode into an empty folder, as engine.generation.run does between start and exports.

        `after` is called with "sampling" and "decoding" when they are done.
        """
        timed = TimedDenoiser(denoiser)
        sampling = self.open(folder, timed)
        with sampling.canvas:
            start = time.perf_counter()
            sample_large(sampling)
            middle, waited = time.perf_counter(), timed.waited_s
            after("sampling")
            resumed = time.perf_counter()
            outputs.decode(sampling, folder, self.scale.base_mpp, {"generator": "benchmarks"})
            end = time.perf_counter()
            after("decoding")
        return Timing(middle - start, end - resumed, waited, timed.waited_s - waited)


def maps_for(config: RunConfig, model: ZoomLDM, denoiser: DenoiseTiles) -> Maps:
    """Return the guidance map that a method needs: the model's own, or one fitted as a run would fit it."""
    name = "guidance/linear"
    if config.guidance.method != "linear" or name in model.extras:
        return dict(model.extras)
    grid = np.random.default_rng(0).standard_normal((model.config.ssl_dim, 4, 4), dtype=np.float32)
    return {name: fit_map(grid, denoiser, config.sampling.weight, config.sampling.batch_size)}


def picture_digest(folder: Path) -> str:
    """Return the sha256 of the decoded picture's pixels."""
    image, found = Image.open(folder / outputs.IMAGE), hashlib.sha256()
    for y0 in range(0, image.height, BAND_PX):
        found.update(image.read(y0, min(y0 + BAND_PX, image.height)).tobytes())
    return found.hexdigest()
