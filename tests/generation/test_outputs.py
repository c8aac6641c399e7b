from pathlib import Path

import numpy as np
import pytest

from engine.canvas.canvas import Canvas
from engine.core.numerics import keyed_noise
from engine.core.progress import Clock
from engine.core.units import MagnificationScale
from engine.generation import outputs
from engine.images.ome_zarr import Image
from engine.parity_checks.activations import SilentCallback
from engine.sampling.config import CanvasConfig, DecodeConfig, GuidanceConfig, OutputConfig, RunConfig, SamplingConfig
from engine.sampling.denoiser import PointwiseDenoiser
from engine.sampling.pixels import to_uint8
from engine.sampling.plan import make_plan
from engine.sampling.sampler import Sampling, sample_large


@pytest.mark.parametrize(("height", "width"), [(301, 1027), (1030, 258)])
def test_a_picture_has_the_size_asked_for_to_the_px(tmp_path: Path, height: int, width: int) -> None:
    config = RunConfig(
        canvas=CanvasConfig(height, width),
        sampling=SamplingConfig(stride=1000),
        guidance=GuidanceConfig("none"),
        decode=DecodeConfig(tile_stride=40),
        output=OutputConfig(formats=("tiff", "png")),
    )
    plan = make_plan(config, MagnificationScale(("20x", "10x", "5x"), 0.5))
    levels = {n.name: (n.height, n.width) for n in plan.levels}
    with Canvas.open(tmp_path, {}, levels) as canvas:
        grid = np.random.default_rng(0).standard_normal((4, *plan.grid_shape)).astype(np.float32)
        s = Sampling(
            plan, canvas, grid, PointwiseDenoiser(), config.guidance, None, 0.8, keyed_noise(0), SilentCallback()
        )
        sample_large(s)
        outputs.decode(s, tmp_path, 0.5, {})
        latents = canvas.read("20x", 0, plan.finest.height)
    outputs.export(tmp_path, config, plan, Clock())
    outputs.report(tmp_path, config, plan, {}, Clock())
    assert outputs.missing(tmp_path, config, plan) == []
    image = Image.open(tmp_path / "image.ome.zarr")
    assert (image.height, image.width) == (height, width)
    expected = to_uint8(latents.repeat(4, 1).repeat(4, 2)[:, :height, :width])
    difference = np.abs(image.read(0, height, 0, width).astype(int) - expected)
    assert difference.max() <= 1  # averaging equal windows may round across a grey level
