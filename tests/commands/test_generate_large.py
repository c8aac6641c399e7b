"""Command 1 as a user meets it: a whole run of a tiny model, resumes, mistakes and their exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import zarr
from PIL import Image

import generate_large
from actors.batches import PoolStats, PoolWatch
from engine.core.cli import PROJECT_ROOT
from engine.core.config import RayConfig
from engine.core.runtime import hardware_of
from engine.model.zoomldm import ZoomLDM
from engine.sampling.denoiser import LocalDenoiser
from tests.support.forked import start
from tests.support.tiny_run import store_inputs

SCRIPT = PROJECT_ROOT / "generate_large.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run of 512x384 px and three steps: a random tiny model with a colour map, and 2x2 SSL vectors."""
    folder = tmp_path_factory.mktemp("inputs")
    flags = {
        **store_inputs(folder, 2, 2),
        "canvas.height": 512,
        "canvas.width": 384,
        "sampling.stride": 400,
        "sampling.weight": 0,
        "sampling.batch_size": 2,
        "decode.batch_size": 2,
        "ray.enabled": "false",
    }
    return [f"--{k}={v}" for k, v in flags.items()]


def picture(folder: Path) -> bytes:
    """Return the pixels of a finished run."""
    array = zarr.open_array(str(folder / "image.ome.zarr" / "0"), mode="r")
    return np.asarray(array[:]).tobytes()


@contextmanager
def started(argv: list[str], cwd: Path, script: Path = SCRIPT) -> Iterator[subprocess.Popen[str]]:
    """Run the command in a process of its own that never outlives the test."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script), *argv], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # ends its Ray too
                try:
                    process.communicate(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()


@pytest.fixture(scope="module")
def finished(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert generate_large.main([*inputs, f"--output.folder={folder}", "--output.formats=[tiff, png]"]) == 0
    return folder


def test_run_leaves_what_the_design_says(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "canvas.zarr", "state.json", "config.yaml", "image.ome.zarr", "image.tiff", "image.png", "preview.png",
        "guide.png", "report.json",
    }  # fmt: skip
    with Image.open(finished / "image.png") as whole, Image.open(finished / "guide.png") as guide:
        assert whole.size == (384, 512)
        assert guide.size == (256, 256)
        assert (
            whole.tobytes()
            == np.frombuffer(picture(finished), np.uint8).reshape(3, 512, 384).transpose(1, 2, 0).tobytes()
        )
    report = json.loads((finished / "report.json").read_text())
    assert report["device"] == "cpu"
    assert report["tiles"] == 3 * 1 + 2 * 6
    assert 0 <= report["orchestration_share"] <= 1
    assert {"sampling", "decoding", "exports"} <= set(report["timings_s"])
    assert report["seam_score"] > 0
    assert report["consistency_psnr_db"] > 0


def test_finished_run_only_says_so(finished: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "report.json").read_bytes()
    assert generate_large.main([*inputs, f"--output.folder={finished}", "--output.formats=[tiff, png]"]) == 0
    assert "nothing is missing" in capsys.readouterr().err
    assert (finished / "report.json").read_bytes() == before


@pytest.mark.parametrize("lost", ["preview.png", "image.tiff", "guide.png", "report.json", "image.ome.zarr"])
def test_what_is_missing_is_made_again(finished: Path, inputs: list[str], tmp_path: Path, lost: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    if (folder / lost).is_dir():
        shutil.rmtree(folder / lost)
    else:
        (folder / lost).unlink()
    assert generate_large.main([*inputs, f"--output.folder={folder}"]) == 0
    assert picture(folder) == picture(finished)
    if lost.endswith(".png"):
        with Image.open(folder / lost) as again, Image.open(finished / lost) as before:
            assert again.tobytes() == before.tobytes()
    assert (folder / lost).exists()


def test_killed_run_resumes_to_the_same_bytes(finished: Path, inputs: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    argv = [*inputs, f"--output.folder={folder}"]
    state = folder / "state.json"
    process = start(generate_large.main, argv)
    while process.is_alive() and not (state.exists() and json.loads(state.read_text())["commits"] >= 2):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "report.json").exists()
    assert generate_large.main(argv) == 0
    assert picture(folder) == picture(finished)
    assert json.loads((folder / "report.json").read_text())["resumed"]


def test_ctrl_c_says_how_to_continue(inputs: list[str], tmp_path: Path) -> None:
    with started([*inputs, "--output.folder=run"], tmp_path) as process:
        while not (tmp_path / "run" / "state.json").exists():
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=250)
    assert process.returncode == 130
    assert "run the same command again to continue" in err
    assert "Traceback" not in err


@pytest.mark.ray
def test_ray_gives_the_same_bytes_from_a_copy_of_the_one_file(
    finished: Path, inputs: list[str], tmp_path: Path
) -> None:
    """As `ray submit` does it: only the script travels, and it runs in another folder. No process stays behind."""
    script = Path(shutil.copy(SCRIPT, tmp_path))
    before = {p.pid for p in psutil.process_iter()}
    with started([*inputs, "--ray.enabled=true", "--output.folder=run"], tmp_path, script) as process:
        out, err = process.communicate(timeout=850)
    assert process.returncode == 0, err
    assert "The pictures are in run" in out
    assert picture(tmp_path / "run") == picture(finished)
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if p.pid not in before and str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]
    assert left == []


def test_metrics_hear_of_a_run_on_ray_up_to_its_scores(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas leave before the exports, Ray after the scores. Ray itself is not needed to see that order."""
    import actors.backend

    events: list[tuple[object, ...]] = []

    @contextmanager
    def connect(config: RayConfig) -> Iterator[None]:
        yield
        events.append(("ray left",))

    class Pool(LocalDenoiser):
        replicas, stats = [SimpleNamespace(hardware=hardware_of("cpu"))], PoolStats(replicas=1)

        def __init__(self, model: ZoomLDM, config: RayConfig, *, watch: PoolWatch, **_: object) -> None:
            super().__init__(model)
            watch.restart()

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None:
            events.append(("replicas left",))

        def wait_ready(self) -> None: ...

    class Told:
        def __init__(self, run: str) -> None:
            events.append(("run", run))

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *told: events.append((name, *told))

    monkeypatch.setattr(actors.backend, "joins_cluster", lambda _: False)  # whatever tests before this one announced
    monkeypatch.setattr(actors.backend, "connect", connect)
    monkeypatch.setattr(actors.backend, "DenoiserPool", Pool)
    monkeypatch.setattr(actors.backend, "RunMetrics", Told)
    folder = tmp_path / "run"
    assert generate_large.main([*inputs, "--ray.enabled=true", f"--output.folder={folder}"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert events[:3] == [("run", str(folder)), ("restart",), ("step", "10x", 0, 3)]
    steps = [e[1:] for e in events if e[0] == "step"]
    assert steps == [*(("10x", n, 3) for n in range(4)), *(("20x", n, 2) for n in range(3))]
    assert sum(e[1] for e in events if e[0] == "tiles" and isinstance(e[1], int)) == report["tiles"]
    assert [e[0] for e in events[-3:]] == ["replicas left", "judged", "ray left"]
    scores = events[-2][1]
    assert isinstance(scores, dict)
    for key in ("seam_score", "consistency_psnr_db"):
        assert scores[key] == pytest.approx(report[key])


@pytest.mark.ray
def test_ray_address_that_does_not_answer(inputs: list[str], tmp_path: Path) -> None:
    argv = [*inputs, "--ray.enabled=true", "--ray.address=127.0.0.1:9", "--output.folder=run"]
    with started(argv, tmp_path) as process:
        _, err = process.communicate(timeout=850)
    assert process.returncode == 1
    assert "127.0.0.1:9" in err
    assert "Traceback" not in err


def test_plan_prints_and_stops(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_large.main([*inputs, "--plan", f"--output.folder={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "512 x 384" in out
    assert "20x 6 (3)" in out
    assert "FLOP" in out
    assert not (tmp_path / "run").exists()


def failed(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 1) -> str:
    assert generate_large.main(argv) == code
    message = capsys.readouterr().err
    assert message.startswith("generate_large.py: ")
    return message


def test_embeddings_that_do_not_fit(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*inputs, "--canvas.height=1024", f"--output.folder={tmp_path / 'run'}"]
    message = failed(capsys, argv)
    assert "4x2" in message
    assert "2x2" in message
    assert not (tmp_path / "run").exists()


def test_no_condition(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f for f in inputs if not f.startswith("--embeddings")] + [f"--output.folder={tmp_path / 'run'}"]
    message = failed(capsys, argv)
    assert "--reference" in message
    assert "--embeddings" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_where_one_is_asked_for(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(capsys, [*inputs, "--model.device=cuda", f"--output.folder={tmp_path / 'run'}"])
    assert "needs a GPU" in message


def test_folder_that_cannot_be_written(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    # root may write anywhere but into a file and into /proc
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/zoomldm")):
        assert str(folder) in failed(capsys, [*inputs, f"--output.folder={folder}"])


def test_folder_of_another_plan(finished: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(capsys, [*inputs, "--sampling.seed=1", f"--output.folder={finished}"])
    assert "sampling.seed was 0, now 1" in message


def test_folder_of_something_else(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "thesis.txt" in failed(capsys, [*inputs, f"--output.folder={tmp_path}"])


def test_missing_model(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in failed(capsys, [*inputs, f"--model.source={tmp_path / 'nowhere'}"])


def test_levels_the_model_has_not(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "40x" in failed(capsys, [*inputs, "--canvas.levels=[40x, 20x]"], code=2)


def test_size_below_a_tile(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate_large.main([*inputs, "--canvas.height=128"])
    assert stopped.value.code == 2
    assert "at least 256 px" in capsys.readouterr().err


def test_without_the_packages_it_says_what_to_do(tmp_path: Path) -> None:
    script = shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", "-E", script], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 1
    assert "pip install" in done.stderr
    assert "setup_commands" in done.stderr
    assert "Traceback" not in done.stderr
