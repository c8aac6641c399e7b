from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from engine.conditions.patch_sampler import SCHEDULERS, PatchSampler
from engine.generation.tiles import Source
from engine.model.cdm import CDM, CDMConfig
from engine.model.weights.cdm import save_cdm
from engine.model.zoomldm import ConditionerConfig, ZoomLDM
from engine.sample import main
from engine.slides.phantom.render import Phantom
from tests.support.tiny_run import narrow_config


@pytest.fixture(scope="module")
def model() -> ZoomLDM:
    torch.manual_seed(0)
    return ZoomLDM(narrow_config()).eval()


@pytest.fixture
def arguments(model: ZoomLDM, tmp_path: Path) -> list[str]:
    model.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "grid.npy", np.random.default_rng(0).standard_normal((16, 5, 6)).astype(np.float32))
    return [
        f"--model.source={tmp_path / 'model'}",
        f"--embeddings={tmp_path / 'grid.npy'}",
        f"--folder={tmp_path / 'patches'}",
        "--steps=2",
        "--sampling.batch_size=2",
    ]


def test_patches_and_a_contact_sheet_are_written(arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "--magnification=5x", "--count=3"]) == 0
    files = sorted(p.name for p in (tmp_path / "patches").iterdir())
    assert files == ["5x_0000.png", "5x_0001.png", "5x_0002.png", "contact_sheet.png"]
    with PIL.Image.open(tmp_path / "patches" / "5x_0002.png") as patch:
        assert patch.size == (256, 256)
        assert patch.mode == "RGB"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_patch_is_a_function_of_seed_number_and_cells(model: ZoomLDM, scheduler: str) -> None:
    cells = list(np.random.default_rng(0).standard_normal((2, 16, 1, 1)).astype(np.float32))
    sampler = PatchSampler(scheduler, 2, 2.0, seed=3)
    first = sampler.draw(model, cells, 0)
    assert first.shape == (2, 3, 256, 256)
    assert np.isfinite(first).all()
    assert np.array_equal(sampler.draw(model, cells, 0), first)
    assert not np.array_equal(PatchSampler(scheduler, 2, 2.0, seed=4).draw(model, cells, 0), first)
    assert not np.array_equal(sampler.draw(model, cells[::-1], 0), first)


@pytest.fixture
def alone(model: ZoomLDM, tmp_path: Path) -> list[str]:
    """Arguments for a model with a CDM and nothing to imitate."""
    model.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    cdm = CDM(CDMConfig(tokens=65, channels=32, magnifications=4, width=16, layers=1, heads=2))
    torch.nn.init.normal_(cdm.final_layer.linear.weight, std=0.1)
    save_cdm(tmp_path / "model/cdm", cdm)
    return [f"--model.source={tmp_path / 'model'}", "--condition=cdm", "--cdm_steps=2", "--steps=2"]


def test_without_a_reference_the_cdm_draws_the_conditions(alone: list[str], tmp_path: Path) -> None:
    drawn = {}
    for name, flags in {
        "a": ["--count=2", "--sampling.batch_size=2"],
        "one": ["--count=1", "--sampling.batch_size=2"],
        "seed": ["--count=1", "--sampling.seed=1"],
        "coarse": ["--count=1", "--magnification=2.5x"],
    }.items():
        assert main([*alone, f"--folder={tmp_path / name}", *flags]) == 0
        patch = next(p for p in sorted((tmp_path / name).iterdir()) if p.name.endswith("x_0000.png"))
        with PIL.Image.open(patch) as image:
            drawn[name] = np.asarray(image).astype(int)
    assert np.abs(drawn["a"] - drawn["one"]).max() <= 1, "patch 0 does not depend on how many are drawn"
    assert np.abs(drawn["a"] - drawn["seed"]).max() > 10
    with PIL.Image.open(tmp_path / "a/contact_sheet.png") as sheet:
        assert sheet.size == (2 * 264 + 8, 264 + 8), "no room is kept for references"


def test_the_condition_changes_the_patch(model: ZoomLDM) -> None:
    sampler, context = PatchSampler("ddim", 2, 2.0, seed=3), torch.randn(1, 65, 32)
    assert not np.array_equal(sampler.draw_from(model, context), sampler.draw_from(model, -context))


def test_a_model_without_a_cdm_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*[a for a in arguments if "embeddings" not in a], "--condition=cdm"]) == 1
    assert "must carry a CDM" in capsys.readouterr().err


def test_the_predecessors_conditioner_works_the_same() -> None:
    conditioner = ConditionerConfig(kind="token", output_dim=32)
    old = ZoomLDM(narrow_config(magnifications=("20x",), conditioner=conditioner)).eval()
    cells = list(np.random.default_rng(0).standard_normal((1, 16, 1, 1)).astype(np.float32))
    assert PatchSampler("ddim", 2, 2.0, seed=0).draw(old, cells, 0).shape == (1, 3, 256, 256)


def test_the_reference_lies_under_its_patch() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1024, 1280, 3), np.uint8)
    source = Source(np.zeros((4, 4, 5), np.float32), picture)
    corners = source.corners(2, 6)
    assert all(0 <= y <= 2 and 0 <= x <= 3 for y, x in corners)
    under = source.reference(1, 3, 2)
    assert under is not None
    boxes = picture[256:768, 768:1280].reshape(256, 2, 256, 2, 3).mean((1, 3))
    assert np.abs(under - boxes).max() <= 1


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--magnification=7x"], 2, "must be one of 20x"),
        (["--magnification=2.5x"], 2, "covers 8 x 8 cells; the source has 5 x 6"),
        (["--scheduler=dimm"], 2, "scheduler must be one of ddim"),
        (["--scale=0.5"], 2, "scale must be at least 1"),
        (["--condition=cdm"], 2, "condition cdm takes neither reference nor embeddings"),
        (["--cdm_steps=1"], 2, "cdm_steps must be at least 2"),
    ],
)
def test_bad_input(
    arguments: list[str], flags: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main([*arguments, *flags])
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_weak_variation_stays_near_its_picture(scheduler: str) -> None:
    demo = ZoomLDM.from_pretrained("demo")
    tissue = Phantom(3).render(0, 0, 256, 256, 0.5).transpose(2, 0, 1)[None]
    picture = np.ascontiguousarray(tissue, np.float32) / 127.5 - 1
    cells = [np.random.default_rng(0).standard_normal((demo.config.ssl_dim, 1, 1)).astype(np.float32)]

    def distance(strength: float) -> float:
        drawn = PatchSampler(scheduler, 10, 1.0, seed=3, strength=strength).draw(demo, cells, 0, 0, picture)
        return float(np.abs(drawn - picture).mean())

    weak, middle, strong = distance(0.1), distance(0.5), distance(1.0)
    assert weak < 0.1
    assert weak < 0.7 * middle < 0.7 * strong
