"""The command: a run, finished or at work, becomes files that other readers open; mistakes cost nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import pyvips
import tifffile
import torch

from engine.core.config import ModelConfigSection, RayConfig
from engine.core.progress import Progress
from engine.export import main
from engine.generation.run import prepare, run
from engine.generation.session import Backend, local_backend
from engine.images.ome_zarr import Image
from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.sampling.config import CanvasConfig, GuidanceConfig, OutputConfig, RunConfig, SamplingConfig
from tests.support.denoiser_contract import Dying

HEIGHT, WIDTH = 260, 600


def make_run(parent: Path, batches: int) -> Path:
    """Run until so many batches of tiles are in; two steps of one batch each make a whole run."""
    torch.manual_seed(0)
    ZoomLDM(tiny_config()).save_pretrained(parent / "model")
    np.save(parent / "grid.npy", np.random.default_rng(0).standard_normal((16, 2, 3)).astype(np.float32))
    config = RunConfig(
        model=ModelConfigSection(source=str(parent / "model"), device="cpu"),
        canvas=CanvasConfig(HEIGHT, WIDTH, levels=("20x",)),
        sampling=SamplingConfig(stride=500, batch_size=6),
        guidance=GuidanceConfig("none"),
        ray=RayConfig(enabled=False),
        output=OutputConfig(str(parent / "run"), formats=("tiff", "ome-tiff", "dzi", "png")),
        embeddings=str(parent / "grid.npy"),
    )

    @contextmanager
    def mortal(model: ZoomLDM, config: RunConfig) -> Iterator[Backend]:
        with local_backend(model, config) as backend:
            yield replace(backend, denoiser=Dying(backend.denoiser, batches))

    with suppress(ConnectionError):
        run(prepare(config), mortal, Progress())
    return parent / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("finished"), 99)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted in its last step."""
    return make_run(tmp_path_factory.mktemp("stopped"), 1)


def exported(capsys: pytest.CaptureFixture[str], *argv: object) -> Path:
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert code == 0, err
    return Path(out.strip())


def vips(path: Path) -> np.ndarray:
    return pyvips.Image.new_from_file(str(path)).numpy().transpose(2, 0, 1)


def pixels_of(folder: Path) -> np.ndarray:
    return Image.open(folder / "image.ome.zarr").read(0, HEIGHT)


def test_a_run_leaves_what_its_config_asks_for(finished: Path) -> None:
    for name in ("image.tiff", "image.ome.tiff", "image.png"):
        np.testing.assert_array_equal(vips(finished / name), pixels_of(finished))
    assert (finished / "image.dzi").is_file()
    assert (finished / "image_files" / "10").is_dir()
    said = Image.open(finished / "image.ome.zarr").provenance
    state = json.loads((finished / "state.json").read_text())
    assert said["synthetic"] is True
    assert (said["plan"], said["config"]) == (state["digest"], state["keys"])
    assert said["config"]["sampling.seed"] == said["seed"] == 0


@pytest.mark.parametrize("flags", [[], ["--region=37,11,333,200"]])
@pytest.mark.parametrize("name", ["tiff", "ome-tiff", "png"])
def test_finished_run_without_a_model(
    finished: Path, name: str, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.generation.preview.load_model", None)
    path = exported(capsys, finished, "--format", name, *flags)
    assert path.parent == finished / "exports"
    expected = pixels_of(finished)
    np.testing.assert_array_equal(vips(path), expected[:, 11:211, 37:370] if flags else expected)


def test_a_region_has_levels_scale_and_place_of_its_own(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(capsys, finished, "--format", "tiff", "--region=8,4,590,250", "--level=1")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0].aspage()
        said = json.loads(page.description)
        assert page.shape == (125, 295, 3)
    assert said["mpp_um"] == 2 * 0.5
    assert said["region_xywh_px"] == [8, 4, 590, 250]
    assert said["synthetic"] is True


def test_thumbnail_and_jpeg(finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = exported(capsys, finished, "--format=jpeg", "--max_px=150", f"--out={tmp_path / 'small.jpg'}")
    with PIL.Image.open(path) as jpeg:
        assert jpeg.size == (150, 65)
        assert json.loads(jpeg.getexif()[270])["mpp_um"] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["small.jpg"]


def test_run_at_work_shows_its_current_x0(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not (stopped / "image.ome.zarr").exists()
    whole = exported(capsys, stopped, "--format", "png")
    assert whole.name.startswith("x0_joint_")
    part = exported(capsys, stopped, "--format", "tiff", "--region", "100,30,300,222", "--device", "cpu")
    pixels = vips(whole)
    assert pixels.shape == (3, HEIGHT, WIDTH)
    assert pixels.std() > 1
    # Tiles keep other company in their batches, which may change last bits.
    assert np.abs(vips(part).astype(int) - pixels[:, 30:252, 100:400]).max() <= 1
    with tifffile.TiffFile(part) as tiff:
        said = json.loads(tiff.pages[0].aspage().description)
    assert said["unfinished"]["pass"] == "joint"
    assert said["unfinished"]["guidance"] == "left out"
    assert said["region_xywh_px"] == [100, 30, 300, 222]
    assert not list(stopped.glob("exports/*.partial"))


def test_x0_of_the_last_step_is_the_finished_picture(finished: Path, stopped: Path, capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """With nothing left to do, the latents themselves are decoded, as the run does."""
    before = pixels_of(finished)
    monkeypatch.setattr("engine.generation.export.find_picture", lambda folder: None)
    path = exported(capsys, finished, "--format", "png", f"--out={finished / 'exports' / 'again.png'}")
    np.testing.assert_array_equal(vips(path), before)
    with PIL.Image.open(path) as png:
        assert "unfinished" not in json.loads(png.info["provenance"])


def test_other_weights_are_refused(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (stopped / "config.yaml").read_text()
    torch.manual_seed(1)
    ZoomLDM(tiny_config()).save_pretrained(tmp_path / "other")
    source = str(stopped.parent / "model")
    try:
        (stopped / "config.yaml").write_text(text.replace(source, str(tmp_path / "other")))
        assert main([str(stopped), "--format=png"]) == 1
        assert "model.weights was" in capsys.readouterr().err
        (stopped / "config.yaml").unlink()
        assert main([str(stopped), "--format=png"]) == 1
        assert "config.yaml must say how the run is made" in capsys.readouterr().err
    finally:
        (stopped / "config.yaml").write_text(text)


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--format=png", "--region=500,0,200,100"], 2, "must lie inside the picture, 600 x 260 px"),
        (["--format=png", "--region=0,0,0,100"], 2, "not be empty"),
        (["--format=png", "--region=1,2,3"], 2, "x,y,width,height in whole px"),
        (["--format=png", "--level=7"], 2, "level must lie in 0..1"),
        (["--format=png", "--level=1", "--max_px=10"], 2, "exclude each other"),
        (["--format=png", "--max_px=5000"], 2, "max_px must lie in 1..2048"),
        (["--format=png", "--compression=jpeg"], 2, "compression is a choice of tiff, ome-tiff, dzi"),
        (["--format=tiff", "--ngff=0.4"], 2, "ngff is the version of ome-zarr"),
        (["--format=ome-tiff", "--out=a.png"], 2, "must end in .ome.tiff or .ome.tif"),
        (["--format=bmp"], 2, "'ome-tiff'"),
        ([], 2, "format"),
    ],
)
@pytest.mark.parametrize("which", ["finished", "stopped"])
def test_bad_input(
    which: str, flags: list[str], code: int, text: str, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = request.getfixturevalue(which)
    before = sorted(folder.rglob("*"))
    if which == "stopped" and "level must" in text:
        pytest.skip("the picture is predicted before its levels are known")
    try:
        found = main([str(folder), *flags])
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert text in capsys.readouterr().err
    assert [p for p in sorted(folder.rglob("*")) if p.name != "exports"] == [p for p in before if p.name != "exports"]


def test_what_is_the_runs_is_not_written(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "image.tiff").read_bytes()
    assert main([str(finished), "--format=tiff", f"--out={finished / 'image.tiff'}"]) == 2
    assert "belong to the run" in capsys.readouterr().err
    assert (finished / "image.tiff").read_bytes() == before
    assert main([str(tmp_path), "--format=tiff"]) == 1
    assert "must be the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_by_version(finished: Path, version: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(capsys, finished, "--format=ome-zarr", f"--ngff={version}")
    assert (path / ".zattrs").exists() == (version == "0.4")
    if version == "0.5":
        np.testing.assert_array_equal(Image.open(path).read(0, HEIGHT), pixels_of(finished))
