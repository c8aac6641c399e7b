"""The order of a run: what names it, what it is held to, the fitted map, and what callbacks hear."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engine.canvas.environment import check_environment
from engine.conditions.conditions import Conditions
from engine.core.config import ModelConfigSection
from engine.core.errors import CanvasError, CanvasMismatchError
from engine.core.progress import Progress
from engine.generation import guidance_fit
from engine.generation.guidance_fit import fit_map, stored_or_fitted
from engine.generation.outputs import Part, tile_edges
from engine.generation.run import Job, picture_keys, prepare, write_config
from engine.generation.session import TimedDenoiser
from engine.model.colour_map import LinearColour
from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.sampling.config import CanvasConfig, OutputConfig, RunConfig, SamplingConfig
from engine.sampling.denoiser import DecodeBatch, LocalDenoiser
from engine.sampling.plan import make_plan
from tests.support.tiny_run import narrow_config, narrow_model


@pytest.fixture(scope="module")
def model() -> ZoomLDM:
    return narrow_model()


GRID = np.random.default_rng(0).normal(size=(16, 2, 2)).astype(np.float32)


def test_keys_name_contents_not_places(model: ZoomLDM) -> None:
    conditions = Conditions(GRID, "abc")
    here = RunConfig(model=ModelConfigSection(source="a", device="cpu"), reference="x.png")
    there = RunConfig(model=ModelConfigSection(source="b", variant="c"), reference="y.png", output=OutputConfig("z"))
    assert picture_keys(here, model, conditions) == picture_keys(there, model, conditions)
    other = replace(here, sampling=SamplingConfig(seed=5))
    assert picture_keys(here, model, conditions) != picture_keys(other, model, conditions)
    assert picture_keys(here, model, conditions) != picture_keys(here, model, Conditions(GRID, "abd"))


def test_resolved_config_is_plain_yaml(tmp_path: Path) -> None:
    config = RunConfig(canvas=CanvasConfig(levels=("10x", "20x")), output=OutputConfig(folder=str(tmp_path)))
    scale = tiny_config()
    write_config(Job(config, scale, make_plan(config, scale.scale)))
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored["canvas"]["levels"] == ["10x", "20x"]
    assert stored["output"]["folder"] == str(tmp_path)


@pytest.mark.parametrize(("size", "begins"), [(256, None), (1024, 600), (2048, 700)])
def test_where_a_canvas_begins_is_settled_before_its_keys(size: int, begins: int | None) -> None:
    job = prepare(RunConfig(canvas=CanvasConfig(size, size)), narrow_config())
    assert job.config.sampling.from_guide == begins


def test_run_is_held_to_where_it_began(tmp_path: Path) -> None:
    cpu, cuda = {"device": "cpu"}, {"device": "cuda"}
    check_environment(tmp_path, cuda)
    check_environment(tmp_path, cuda)
    with pytest.raises(CanvasMismatchError, match="device was cuda, now cpu"):
        check_environment(tmp_path, cpu)
    then = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps({**then, "torch": "1.0"}))
    with pytest.raises(CanvasMismatchError, match=r"torch was 1\.0"):
        check_environment(tmp_path, cuda)
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(CanvasError, match=r"environment\.json must say"):
        check_environment(tmp_path, cuda)


def test_fitted_map_is_a_function_of_its_inputs_and_is_kept(
    model: ZoomLDM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance_fit, "FIT_TILES", 4)
    denoiser = LocalDenoiser(model)
    tensors = fit_map(GRID, denoiser, 0.0, 2)
    colour = LinearColour.from_tensors(tensors)
    assert torch.isfinite(colour.inverse(0.1)).all()
    path = tmp_path / "guidance_linear.safetensors"
    stored = stored_or_fitted(path, GRID, denoiser, 0.0, 2)["guidance/linear"]
    assert all(torch.equal(stored[k], tensors[k]) for k in tensors)
    before = path.read_bytes()
    stored_or_fitted(path, GRID, denoiser, 0.0, 2)
    assert path.read_bytes() == before
    path.write_bytes(before[:20])
    with pytest.raises(CanvasError, match="guidance_linear.safetensors"):
        stored_or_fitted(path, GRID, denoiser, 0.0, 2)


def test_edges_lie_where_tiles_begin_and_end() -> None:
    config = RunConfig(canvas=CanvasConfig(height=448, width=256))
    ys, xs = tile_edges(make_plan(config, tiny_config().scale))
    assert set(ys) == {0, 192, 256, 448} | {128, 384}  # sampled at 0 and 192; decoded at 128, too
    assert set(xs) == {0, 256}


def test_cropped_picture_is_a_multiple_of_the_guide() -> None:
    class Whole:
        height, width = 515, 386

        def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
            return np.zeros((3, y1 - y0, x1 - x0), np.uint8)

    part = Part.multiple(Whole(), 4)  # type: ignore[arg-type]
    assert (part.height, part.width) == (512, 384)
    assert part.read(0, 10).shape == (3, 10, 384)


def test_job_log_gets_plain_lines() -> None:
    out = io.StringIO()
    progress = Progress(out)
    progress.replicas = lambda: 3
    progress.step("joint", 0, 2)
    progress.tiles(8)
    progress.step("joint", 1, 2)
    progress.step("joint", 2, 2)
    progress.step("refine", 5, 5)
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["joint: step 1/2", "joint: step 2/2"]
    assert "tiles/s, 3 replica(s) alive" in lines[0]
    assert progress.tile_count == 8


def test_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    progress = Progress(out)
    progress.step("joint", 1, 3)
    progress.tiles(4)
    progress.say("a word")
    progress.step("joint", 3, 3)
    assert "joint" in out.getvalue()
    assert "3/3" in out.getvalue()
    assert "a word\n" in out.getvalue()


def test_waiting_is_the_networks_time_alone(model: ZoomLDM) -> None:
    timed = TimedDenoiser(LocalDenoiser(model))
    batches = (DecodeBatch(str(i), (0,), np.zeros((1, 3, 64, 64), np.float32)) for i in range(2))
    assert [a.key for a in timed.decode(batches)] == ["0", "1"]
    assert timed.waited_s > 0
