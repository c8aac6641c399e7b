"""condition=cdm: a canvas without any reference, from a summary that the model's CDM draws."""

from pathlib import Path

import numpy as np
import pytest
import torch

import generate_large
from engine.conditions import conditions
from engine.images.ome_zarr import Image
from engine.model.cdm import CDM, CDMConfig
from engine.model.weights.cdm import save_cdm
from engine.model.zoomldm import tiny_config
from tests.support.tiny_run import store_model


def random_cdm(seed: int) -> CDM:
    """A CDM for tiny_config's Summarizer, whose zero gates are opened so that its weights matter."""
    model = tiny_config()
    sizes = {"channels": model.conditioner.output_dim, "magnifications": len(model.magnifications)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cdm = CDM(CDMConfig(**sizes, width=16, layers=1, heads=2))
        for parameter in cdm.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return cdm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    save_cdm(folder / "cdm", random_cdm(0))
    flags = {
        "model.source": store_model(folder),
        "model.cdm_source": folder / "cdm",
        "condition": "cdm",
        "cdm_steps": 2,
        "inversion.steps": 2,
        "canvas.height": 512,
        "canvas.width": 384,
        "sampling.stride": 500,
        "sampling.weight": 0,
        "output.formats": "[]",
        "ray.enabled": "false",
    }
    return [f"--{k}={v}" for k, v in flags.items()]


@pytest.fixture(scope="module")
def made(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert generate_large.main([*inputs, f"--output.folder={folder}"]) == 0
    return folder


def grid(folder: Path) -> np.ndarray:
    return np.load(folder / conditions.STORED)


def test_it_needs_no_reference_and_says_so(made: Path) -> None:
    assert grid(made).shape == (16, 2, 2)
    said = Image.open(made / "image.ome.zarr").provenance["config"]
    assert (said["condition"], said["cdm_steps"], said["inversion.steps"]) == ("cdm", 2, 2)
    assert "model.cdm_source" not in said


def test_a_resume_draws_nothing_again(made: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the summary must not be drawn again")

    monkeypatch.setattr(conditions, "sample_summaries", refuse)
    (made / "report.json").unlink()
    before = grid(made)
    assert generate_large.main([*inputs, f"--output.folder={made}"]) == 0
    assert np.array_equal(grid(made), before)


def test_another_cdm_is_refused(
    made: Path, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_cdm(tmp_path / "other", random_cdm(1))
    argv = [*inputs, f"--model.cdm_source={tmp_path / 'other'}", f"--output.folder={made}"]
    assert generate_large.main(argv) == 1
    assert "conditions was" in capsys.readouterr().err


def test_seed_and_cdm_decide_the_grid(made: Path, inputs: list[str], tmp_path: Path) -> None:
    argv = [*inputs, "--sampling.seed=1", "--sampling.start=500", f"--output.folder={tmp_path / 'run'}"]
    assert generate_large.main(argv) == 0
    assert not np.array_equal(grid(tmp_path / "run"), grid(made))


def test_a_canvas_larger_than_the_coarsest_tile_repeats_the_dream_mirrored(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 10x a tile covers 2 x 2 cells: of 4 columns the last two are the first two again, and the user is told."""
    larger = ["--canvas.levels=[10x, 20x]", "--canvas.height=320", "--canvas.width=1024", "--sampling.start=500"]
    assert generate_large.main([*inputs, *larger, f"--output.folder={tmp_path / 'run'}"]) == 0
    said = "the CDM's picture covers 2 x 2 cells, the canvas 2 x 4: what is too much is left out, what is missing is"
    assert said in capsys.readouterr().err
    found = grid(tmp_path / "run")
    assert found.shape == (16, 2, 4)
    assert np.array_equal(found[:, :, 2:], found[:, :, 1::-1])
    assert not np.array_equal(found[:, :, 0], found[:, :, 1])
    pixels = Image.open(tmp_path / "run" / "image.ome.zarr").read(0, 256)
    assert pixels.shape == (3, 256, 1024)
    assert not np.array_equal(pixels[..., 768:], pixels[..., :256]), "conditions repeat, noise does not"


def test_a_model_without_a_cdm(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [flag for flag in inputs if not flag.startswith("--model.cdm_source")]
    assert generate_large.main([*argv, f"--output.folder={tmp_path / 'run'}"]) == 1
    assert "must carry a CDM" in capsys.readouterr().err


def test_the_plan_counts_the_inversion(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_large.main([*inputs, "--plan"]) == 0
    assert "inversion       1 window(s), 2 steps" in capsys.readouterr().out
