"""Super-resolution as a user meets it: what a run leaves, resumes, and pictures that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

import generate_large
from engine import superres
from engine.conditions import conditions
from engine.core.units import BRCA_SCALE
from engine.generation.superres import SuperresConfig, factor_of, plan_run
from engine.images.ome_zarr import Image
from engine.model.encoders.demo import DemoEncoder
from engine.model.encoders.texture import RAW_DIM
from engine.model.zoomldm import ZoomLDM
from engine.sampling.back_projection import GuideWindows
from engine.sampling.config import RunConfig
from engine.sampling.denoiser import LocalDenoiser
from engine.sampling.guidance import GuidePicture
from engine.sampling.pixels import to_uint8
from tests.support.tiny_run import store_model

HEIGHT, WIDTH = 96, 130
"""Not square, not whole cells (64 px at 5x), smaller than one tile."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a 4x enlargement in two steps with a random tiny model that has a colour map."""
    folder = tmp_path_factory.mktemp("inputs")
    pixels = np.random.default_rng(0).integers(40, 216, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "low.png")
    flags = {
        "model.source": store_model(folder),
        "inversion.steps": 2,
        "sampling.stride": 100,
        "sampling.weight": 0,
        "output.formats": "[]",
        "ray.enabled": "false",
    }
    return [str(folder / "low.png"), *(f"--{k}={v}" for k, v in flags.items())]


@pytest.fixture(scope="module")
def enlarged(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert superres.main([*inputs, "--scale=4", f"--output.folder={folder}"]) == 0
    return folder


def pixels(folder: Path) -> np.ndarray:
    return Image.open(folder / "image.ome.zarr").read(0, 4 * HEIGHT)


def low(inputs: list[str]) -> np.ndarray:
    return np.asarray(PIL.Image.open(inputs[0]))


def test_reduced_the_result_is_the_picture(enlarged: Path, inputs: list[str]) -> None:
    found = pixels(enlarged)
    assert found.shape == (3, 4 * HEIGHT, 4 * WIDTH)
    small = found.reshape(3, HEIGHT, 4, WIDTH, 4).mean(axis=(2, 4)).transpose(1, 2, 0)
    assert np.abs(small - low(inputs)).mean() < 1.5
    assert json.loads((enlarged / "report.json").read_text())["consistency_psnr_db"] > 30


def test_inversion_may_begin_from_what_the_encoder_says(inputs: list[str], tmp_path: Path) -> None:
    """With steps of nothing it stays there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = DemoEncoder(torch.zeros(RAW_DIM), torch.randn(RAW_DIM, 16) / 10)
    model = ZoomLDM.from_pretrained(store_model(tmp_path, encoder="demo"))
    model.extras["encoder/model"] = encoder.tensors()
    model.save_pretrained(tmp_path / "model")
    flags = [f"--model.source={tmp_path / 'model'}", "--inversion.start=enlarged", "--inversion.lr=1e-7"]
    assert superres.main([*inputs, *flags, "--scale=4", f"--output.folder={tmp_path / 'run'}"]) == 0
    guide = GuidePicture((low(inputs).transpose(2, 0, 1).astype(np.float32) + 0.5) / 127.5 - 1, 4)
    grid = np.load(tmp_path / "run" / conditions.STORED)
    for x in (0, 1):
        cell = torch.from_numpy(to_uint8(GuideWindows.of(guide, [(0, 64 * x)]).enlarged().numpy()))
        np.testing.assert_allclose(grid[:, 0, x], encoder.encode(cell)[0].numpy(), atol=1e-3)
    assert np.abs(grid[:, 0, 0] - grid[:, 0, 1]).max() > 0.01


def test_a_run_leaves_the_picture_as_guide(enlarged: Path, inputs: list[str]) -> None:
    """Mirrored at its lower and right border to one tile."""
    guide = np.asarray(PIL.Image.open(enlarged / "guide.png"))
    assert guide.shape == (256, 256, 3)
    assert np.array_equal(guide[:HEIGHT, :WIDTH], low(inputs))
    assert np.array_equal(guide[HEIGHT, :WIDTH], low(inputs)[-1])
    image = Image.open(enlarged / "image.ome.zarr")
    assert image.mpp_um == pytest.approx(0.5)
    assert image.provenance["config"]["condition"] == "inversion"
    assert np.load(enlarged / "conditions.npy").shape == (16, 2, 3)
    assert not (enlarged / "canvas.zarr" / "5x").exists()


@pytest.mark.parametrize("flag", ["--mpp=2", "--magnification=5x"])
def test_other_words_for_the_scale(
    enlarged: Path, inputs: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert superres.main([*inputs, flag, f"--output.folder={enlarged}"]) == 0
    assert "nothing is missing" in capsys.readouterr().err


def test_its_config_makes_the_same_run(enlarged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_large.main(["--config", str(enlarged / "config.yaml")]) == 0
    assert "nothing is missing" in capsys.readouterr().err


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the grid must not be recovered again")


def test_an_interrupted_run_continues_without_inversion(
    enlarged: Path, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*inputs, "--scale=4", f"--output.folder={tmp_path / 'run'}"]
    calls, denoise = [], LocalDenoiser.denoise_batch

    def stop(self: LocalDenoiser, batch):
        calls.append(batch.key)
        if "t=100" in batch.key:
            raise KeyboardInterrupt
        return denoise(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LocalDenoiser, "denoise_batch", stop)
        assert superres.main(argv) == 130
    assert calls
    monkeypatch.setattr(conditions, "invert", refuse)
    assert superres.main(argv) == 0
    assert np.array_equal(pixels(tmp_path / "run"), pixels(enlarged))


def test_a_picture_that_is_lost_is_decoded_again(
    enlarged: Path, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(enlarged, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "image.ome.zarr")
    monkeypatch.setattr(conditions, "invert", refuse)
    assert superres.main([*inputs, "--scale=4", f"--output.folder={tmp_path / 'copy'}"]) == 0
    assert np.array_equal(pixels(tmp_path / "copy"), pixels(enlarged))


def test_another_picture_is_refused(
    enlarged: Path, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PIL.Image.fromarray(255 - low(inputs)).save(tmp_path / "other.png")
    argv = [str(tmp_path / "other.png"), *inputs[1:], "--scale=4", f"--output.folder={enlarged}"]
    assert superres.main(argv) == 1
    assert "conditions was" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--sampling.start=1000", "--sampling.stride=500"], ["--guidance.method=none"]])
def test_what_it_begins_from_and_steering_change_the_result(
    enlarged: Path, inputs: list[str], tmp_path: Path, flags: list[str]
) -> None:
    grid = f"--embeddings={enlarged / 'conditions.npy'}"
    assert superres.main([*inputs, "--scale=4", grid, *flags, f"--output.folder={tmp_path / 'run'}"]) == 0
    assert not np.array_equal(pixels(tmp_path / "run"), pixels(enlarged))


def test_from_above_t_300_no_px_of_the_given_picture_moves_the_result_by_more_than_eight_grey_levels(
    enlarged: Path, inputs: list[str], tmp_path: Path
) -> None:
    def made(name: str, *flags: str) -> np.ndarray:
        begun = ["--sampling.start=700", "--sampling.stride=350", f"--embeddings={enlarged / 'conditions.npy'}"]
        assert superres.main([*inputs, "--scale=4", *begun, *flags, f"--output.folder={tmp_path / name}"]) == 0
        return pixels(tmp_path / name).astype(int)

    moved, unmoved = made("moved"), made("unmoved", "--guidance.back_projection=0")
    assert yaml.safe_load((tmp_path / "moved" / "config.yaml").read_text())["guidance"]["back_projection"] == 8
    by = (moved - unmoved).reshape(3, HEIGHT, 4, WIDTH, 4).mean(axis=(2, 4))
    assert 7 < np.abs(by).max() < 9  # not exactly 8: px are rounded, and black and white stay within 0..255


def test_a_region_of_it_cannot_be_sampled_again(enlarged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_large.main(["--redo", "0,0,64,64", "--seed", "1", str(enlarged)]) == 2
    assert "was given" in capsys.readouterr().err


def test_a_picture_larger_than_a_tile_is_planned(inputs: list[str], tmp_path: Path) -> None:
    PIL.Image.new("RGB", (600, 300)).save(tmp_path / "large.png")
    plan = plan_run(SuperresConfig(image=str(tmp_path / "large.png"), scale=4)).plan
    assert plan.size_px == (1200, 2400)
    assert [level.name for level in plan.sampled] == ["20x"]
    assert plan.passes[0].tilings[0] is None


def grey(path: Path) -> None:
    PIL.Image.new("L", (128, 128)).save(path)


def transparent(path: Path) -> None:
    PIL.Image.new("RGBA", (128, 128)).save(path)


def tiny(path: Path) -> None:
    PIL.Image.new("RGB", (200, 40)).save(path)


def damaged(path: Path) -> None:
    PIL.Image.new("RGB", (128, 128)).save(path)
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (grey, "must be an 8-bit RGB picture; it is greyscale"),
        (transparent, "must be an 8-bit RGB picture; it is RGB with transparency"),
        (tiny, "must be at least 64x64 px"),
        (damaged, "must be readable"),
        (Path.exists, "must be an existing file"),
    ],
)
def test_pictures_that_cannot_be_used(
    make: Callable[[Path], object], said: str, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "bad.png")
    argv = [str(tmp_path / "bad.png"), *inputs[1:], "--scale=4", f"--output.folder={tmp_path / 'run'}"]
    assert superres.main(argv) == 1
    message = capsys.readouterr().err
    assert message.startswith("python -m engine.superres: ")
    assert said in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scale=3"], "it means 3"),
        (["--scale=1"], "an enlargement of 2, 4"),
        (["--scale=32"], "it means 32"),
        (["--mpp=1.7"], "it means 3.4"),
        (["--magnification=40x"], "40x"),
        ([], "one of scale, mpp and magnification"),
        (["--scale=4", "--mpp=2"], "one of scale, mpp and magnification"),
        (["--scale=4", "--canvas.height=512"], "--canvas.height follows from the picture"),
        (["--scale=4", "--condition=cdm"], "--condition follows from the picture"),
    ],
)
def test_wrong_usage(flags: list[str], said: str, inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = superres.main([*inputs, *flags])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("mpp", "factor"), [(1.0, 2), (2.0, 4), (2.02, 4), (8.0, 16)])
def test_mpp_is_believed_to_two_percent(mpp: float, factor: int) -> None:
    assert factor_of(SuperresConfig(image="any.png", mpp=mpp), BRCA_SCALE) == factor


def test_a_guide_that_does_not_fit_the_canvas(
    enlarged: Path, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--guide={inputs[0]}", "--canvas.levels=[5x, 20x]", "--canvas.height=512", "--canvas.width=512"]
    assert generate_large.main([*inputs[1:], *flags, f"--output.folder={tmp_path / 'run'}"]) == 1
    assert "128 x 128 px" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"condition": "inversion"}, "needs a guide"),
        ({"guide": "low.png"}, "needs canvas.levels"),
        ({"condition": "cdm", "guide": "low.png"}, "makes a guide of its own"),
        ({"condition": "cdm", "reference": "a.png"}, "takes neither reference"),
        ({"condition": "cdm", "cdm_steps": 1}, "cdm_steps"),
    ],
)
def test_keys_that_exclude_each_other(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig(**keys)  # type: ignore[arg-type]


def test_old_runs_keep_their_keys() -> None:
    """Keys that a run does not use would refuse to continue the runs of before."""
    keys = RunConfig().picture_keys()
    assert not [k for k in keys if k.startswith(("inversion", "cdm", "guide", "condition"))]


@pytest.mark.parametrize("ratio", [2, 4, 16])
def test_an_enlarged_tile_is_the_same_in_every_tiling(ratio: int) -> None:
    """Where two tiles overlap, both show the same, and reduced it is the guide."""
    image = np.random.default_rng(0).uniform(-0.8, 0.8, (3, 1024 // ratio, 1024 // ratio)).astype(np.float32)
    guide = GuidePicture(image, ratio)
    first, second = GuideWindows.of(guide, [(32, 0), (64, 16)]).enlarged().numpy()
    np.testing.assert_allclose(first[:, 128:, 64:], second[:, :128, :192], atol=0.02)
    reduced = first.reshape(3, 256 // ratio, ratio, 256 // ratio, ratio).mean(axis=(2, 4))
    wished = image[:, 128 // ratio : 384 // ratio, : 256 // ratio]
    assert np.abs(reduced - wished).mean() < 0.02
