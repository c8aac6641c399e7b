"""A region of a finished run sampled again: what changes, what does not, interruptions, and mistakes."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import generate_large
from engine.core.errors import EngineError
from engine.core.progress import Progress
from engine.core.runtime import hardware_of
from engine.core.streaming import Box
from engine.generation.finished_run import FinishedRun
from engine.generation.inpaint import InpaintConfig, InpaintJob, prepare_inpaint, redo
from engine.generation.inpaint_region import window_under
from engine.generation.run import prepare, stored_config
from engine.generation.session import Backend, StartBackend
from engine.images.ome_zarr import Image
from engine.model.zoomldm import ZoomLDM
from engine.sampling.denoiser import DecodeBatch, DecodedBatch, LocalDenoiser, TileBatch, TilePrediction
from tests.support.tiny_run import narrow_config, store_inputs

HEIGHT, WIDTH = 640, 384
REGION = "20,440,100,200"
"""Touches the left tiles of the two lower rows; the window is rows 192..640, columns 0..256."""
WINDOW = np.s_[:, 192:, :256]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a random tiny model and a guide."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {
        **store_inputs(folder, 3, 2),
        "canvas.height": HEIGHT,
        "canvas.width": WIDTH,
        "sampling.stride": 400,
        "sampling.weight": 0,
        "sampling.batch_size": 2,
        "decode.batch_size": 2,
        "ray.enabled": "false",
        "output.folder": folder / "whole",
        "output.formats": "[png]",
    }
    assert generate_large.main([f"--{k}={v}" for k, v in flags.items()]) == 0
    return folder / "whole"


def argv(run: Path, region: str = REGION, seed: int = 7, *flags: str) -> list[str]:
    return ["--redo", region, "--seed", str(seed), *flags, str(run)]


def again(run: Path, folder: Path, region: str = REGION, seed: int = 7, *flags: str) -> Path:
    """Redo into a folder."""
    assert generate_large.main(argv(run, region, seed, *flags, f"--output.folder={folder}")) == 0
    return folder


def pixels(folder: Path) -> np.ndarray:
    return Image.open(folder / "image.ome.zarr").read(0, HEIGHT).astype(int)


def latents(folder: Path) -> np.ndarray:
    plan = plan_of(folder)
    return FinishedRun(folder).latents(plan, "20x", Box(0, 0, plan.finest.height, plan.finest.width))


def plan_of(folder: Path):
    finished = FinishedRun(folder)
    return prepare(stored_config(finished.root.folder)).plan


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def asked(run: Path, folder: Path, from_t: int = 600) -> InpaintJob:
    config, finished = InpaintConfig(str(run), REGION, 7, from_t), FinishedRun(run)
    return prepare_inpaint(config, finished, stored_config(run, {"output.folder": folder}))


@pytest.fixture(scope="module")
def redone(finished: Path) -> Path:
    """An undisturbed redo, where it goes by itself."""
    before = files(finished)
    assert generate_large.main(argv(finished)) == 0
    assert files(finished) == before
    return finished.parent / "whole_redo_x20_y440_100x200_seed7"


def test_only_the_window_changes(finished: Path, redone: Path) -> None:
    _, window = window_under(plan_of(finished), Box.parse(REGION))
    assert window.box == Box(48, 0, 160, 64)
    for of, part in ((pixels, WINDOW), (latents, np.s_[:, 48:, :64])):
        old, new = of(finished), of(redone)
        changed = old != new
        assert changed[part].mean() > 0.5
        changed[part] = False
        assert not changed.any()


def test_it_is_a_run_with_its_own_record(finished: Path, redone: Path) -> None:
    assert {p.name for p in redone.iterdir()} >= {
        "image.ome.zarr",
        "image.png",
        "preview.png",
        "guide.png",
        "redo.json",
    }
    assert (redone / "guide.png").read_bytes() == (finished / "guide.png").read_bytes()
    report, record = json.loads((redone / "report.json").read_text()), json.loads((redone / "redo.json").read_text())
    told = Image.open(redone / "image.ome.zarr").provenance
    assert "redo.json says which region" in (redone / "config.yaml").read_text()
    assert stored_config(redone).canvas == stored_config(finished).canvas
    made = FinishedRun(redone)
    assert report["plan"] == told["plan"] == made.digest != FinishedRun(finished).digest
    assert told["synthetic"] is True
    assert told["redo"] == record
    assert record["run"] == "../whole"
    assert record["parent_plan"] == told["config"]["redo.parent"] == FinishedRun(finished).digest
    assert (record["region_xywh_px"], record["window_xywh_px"]) == ([20, 440, 100, 200], [0, 192, 256, 448])
    assert (record["seed"], record["from_t"]) == (7, 600)
    assert report["tiles"] == 2 * 2
    assert {k: v for k, v in report["redo"].items() if k in record} == record


def test_the_border_line_is_as_smooth_as_it_was(redone: Path) -> None:
    scores = json.loads((redone / "report.json").read_text())["redo"]
    assert scores["border_seam_score"] == pytest.approx(scores["border_seam_score_before"], rel=0.02)
    assert scores["rim_seam_score"] > 0


def test_a_finished_redo_only_says_so(finished: Path, redone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(redone)
    assert generate_large.main(argv(finished)) == 0
    assert "nothing is missing" in capsys.readouterr().err
    assert {p for p, data in files(redone).items() if before[p] != data} <= {redone / "run.lock"}


@pytest.mark.parametrize("lost", ["image.ome.zarr", "guide.png", "report.json"])
def test_what_is_missing_is_made_again(finished: Path, redone: Path, tmp_path: Path, lost: str) -> None:
    folder = Path(shutil.copytree(redone, tmp_path / "copy"))
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    again(finished, folder)
    assert (folder / lost).exists()
    np.testing.assert_array_equal(pixels(folder), pixels(redone))


class Dying(LocalDenoiser):
    """Its machine dies at a given batch, decoded ones counted too; it reads ahead, as a pool does."""

    left = 0

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        source, held = iter(batches), []
        while True:
            while len(held) < 2 and (batch := next(source, None)) is not None:
                held.append(batch)
            if not held:
                return
            self._live()
            yield self.denoise_batch(held.pop(0))

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        for batch in batches:
            self._live()
            yield self.decode_batch(batch)

    def _live(self) -> None:
        if self.left == 0:
            raise ConnectionError("the machine died")
        self.left -= 1


def mortal(batches: int) -> StartBackend:
    """Return a backend that computes so many batches."""

    @contextmanager
    def start_backend(model: ZoomLDM, config: object) -> Iterator[Backend]:
        denoiser = Dying(model)
        denoiser.left = batches
        yield Backend(denoiser, hardware_of("cpu"), lambda: 1, dict)

    return start_backend


def test_interrupted_equals_uninterrupted(finished: Path, redone: Path, tmp_path: Path) -> None:
    for batches in (0, 2, 1, 4):  # in the guide, the second step, there again, the decoder
        with pytest.raises(ConnectionError):
            redo(asked(finished, tmp_path / "cut"), mortal(batches), Progress())
        with pytest.raises(EngineError, match="must be a finished run"):
            FinishedRun(tmp_path / "cut")
    again(finished, tmp_path / "cut")
    np.testing.assert_array_equal(pixels(tmp_path / "cut"), pixels(redone))
    np.testing.assert_array_equal(latents(tmp_path / "cut"), latents(redone))
    assert json.loads((tmp_path / "cut" / "report.json").read_text())["resumed"]


def test_interrupted_it_names_its_own_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The latents of a region lie in its folder, also where those of the run lie in a bucket."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine._command.redo", interrupted)
    flags = ["--canvas.store=file:///some/where", f"--output.folder={tmp_path / 'new'}"]
    assert generate_large.main(argv(finished, REGION, 7, *flags)) == 130
    assert f"Every finished step is in {tmp_path / 'new'}; run the same command again" in capsys.readouterr().err


def test_who_computes_changes_no_byte(finished: Path, redone: Path, tmp_path: Path) -> None:
    redo(asked(finished, tmp_path / "other"), mortal(99), Progress())
    np.testing.assert_array_equal(pixels(tmp_path / "other"), pixels(redone))


def test_seed_and_timestep_decide_the_picture_and_the_runs_own_seed_is_new(
    finished: Path, redone: Path, tmp_path: Path
) -> None:
    found = [pixels(finished), pixels(redone), pixels(again(finished, tmp_path / "a", REGION, 0))]
    found.append(pixels(again(finished, tmp_path / "b", REGION, 7, "--from_t=200")))
    for i, a in enumerate(found):
        for b in found[:i]:
            assert (a != b)[WINDOW].mean() > 0.3


def test_a_redo_can_be_redone(redone: Path, tmp_path: Path) -> None:
    second = again(redone, tmp_path / "second", "300,0,84,100")
    _, window = window_under(plan_of(redone), Box.parse("300,0,84,100"))
    assert window.box == Box(0, 32, 64, 96)
    for of, part in ((pixels, np.s_[:, :256, 128:]), (latents, np.s_[:, :64, 32:])):
        changed = of(redone) != of(second)
        assert changed[part].mean() > 0.5
        changed[part] = False
        assert not changed.any()
    assert FinishedRun(second).root.folder.resolve() == redone.parent / "whole"
    (tmp_path / "second" / "redo.json").write_text("{}")
    with pytest.raises(EngineError, match=r"redo\.json must say where"):
        FinishedRun(second)


def test_the_same_numbers_twice_are_new_numbers(redone: Path, tmp_path: Path) -> None:
    """Noise that a picture was made with would show in it again; so it depends on the run that is redone."""
    second = again(redone, tmp_path / "second")
    job = asked(redone, second)
    assert job.keys()["redo.parent"] == FinishedRun(redone).digest
    assert (pixels(second) != pixels(redone))[WINDOW].mean() > 0.3


def failed(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 1) -> str:
    capsys.readouterr()
    assert generate_large.main(words) == code
    message = capsys.readouterr().err
    assert message.startswith("generate_large.py: ")
    return message


@pytest.mark.parametrize("region", ["300,0,100,10", "-1,0,10,10", "0,640,10,10", "0,0,0,5", "0,0,10,-5"])
def test_region_outside(finished: Path, region: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(capsys, [f"--redo={region}", "--seed=1", str(finished)], 2)
    assert "must lie inside the picture, 384 x 640 px" in message


def test_timestep_the_run_has_not(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(capsys, argv(finished, REGION, 7, "--from_t=100"), 2)
    assert "from_t must lie in 200..600" in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--redo", "1,2,3", "--seed", "1"], "region must be x,y,width,height in whole px; got '1,2,3'"),
        (["--redo", "a,b,c,d", "--seed", "1"], "whole px"),
        (["--redo", REGION], "seed"),
        (["--redo", REGION, "--seed", "x"], "seed"),
        (["--redo", REGION, "--seed=-1"], "seed must lie in 0.."),
        (["--redo", REGION, "--seed", "1", "--sampling.strid=5"], "did you mean --sampling.stride?"),
    ],
)
def test_wrong_usage(finished: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate_large.main([*words, str(finished)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_no_run_to_redo(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path} must be the folder of a run" in failed(capsys, argv(tmp_path))
    with pytest.raises(SystemExit):
        generate_large.main(["--redo", REGION, "--seed", "1"])
    assert "run" in capsys.readouterr().err


def test_run_that_is_not_finished(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = asked(finished, tmp_path / "cut")
    with pytest.raises(ConnectionError):
        redo(job, mortal(2), Progress())
    assert "must be a finished run; it is after step 1 of pass 1" in failed(capsys, argv(tmp_path / "cut"))


def test_run_of_another_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = ZoomLDM(narrow_config())
    other.save_pretrained(tmp_path / "model")
    folder = f"--output.folder={tmp_path / 'redo'}"
    message = failed(capsys, argv(finished, REGION, 7, f"--model.source={tmp_path / 'model'}", folder))
    assert "model.weights was" in message
    assert not (tmp_path / "redo").exists()


def test_other_keys_must_be_the_runs(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--sampling.weight=1.5", f"--output.folder={tmp_path / 'redo'}")
    assert "sampling.weight was 0.0, now 1.5" in failed(capsys, argv(finished, REGION, 7, *flags))
    assert not (tmp_path / "redo").exists()


def test_folder_that_holds_another_plan(finished: Path, redone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(finished) | files(redone)
    message = failed(capsys, argv(finished, REGION, 8, f"--output.folder={redone}"))
    assert "redo.seed was 7, now 8" in message
    assert "redo.seed was absent" in failed(capsys, argv(finished, REGION, 7, f"--output.folder={finished}"))
    after = files(finished) | files(redone)
    assert {p.name for p in before if before[p] != after[p]} <= {"run.lock"}


def test_parent_that_is_another_run(finished: Path, redone: Path, tmp_path: Path) -> None:
    shutil.copytree(redone, tmp_path / "redo")
    shutil.copytree(redone, tmp_path / "whole")
    (tmp_path / "whole" / "redo.json").write_text((redone / "redo.json").read_text().replace("../whole", str(finished)))
    with pytest.raises(EngineError, match="is a redo of the run"):
        FinishedRun(tmp_path / "redo")


def test_a_picture_that_is_gone(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(folder / "image.ome.zarr")
    assert "must hold its decoded picture" in failed(capsys, argv(folder))
