"""Command 1 with its canvas in a bucket: the same bytes as on a disk, from any machine, after any death."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import generate_large
from engine import export
from engine.canvas import object_client
from engine.canvas.object_storage import ObjectStorage
from engine.canvas.run_state import RunState
from engine.canvas.storage import open_storage
from engine.canvas.view import CanvasView
from engine.conditions.conditions import STORED, _kept_grid
from engine.sampling.config import CanvasConfig, OutputConfig, RunConfig
from tests.commands.test_generate_large import finished, inputs, picture, started  # noqa: F401  # two of them are fixtures


def commits_of(url: str) -> int:
    """Return how many commits state.json counts; 0 while there is none."""
    state = open_storage(url).load()
    return 0 if state is None else state.commits


@pytest.fixture
def argv(inputs: list[str], s3_url: str) -> list[str]:  # noqa: F811
    return [*inputs, "--output.formats=[tiff, png]", f"--canvas.store={s3_url}"]


@pytest.fixture
def interrupted(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was interrupted after its sixth commit, the first step of the finest level."""
    folder, save = tmp_path / "interrupted", ObjectStorage.save

    def save_six_times(storage: ObjectStorage, state: RunState) -> None:
        save(storage, state)
        if state.commits == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "save", save_six_times)
        assert generate_large.main([*argv, f"--output.folder={folder}"]) == 130
    return folder


def test_same_bytes_as_on_a_disk(finished: Path, argv: list[str], s3_url: str, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "run"
    assert generate_large.main([*argv, f"--output.folder={folder}"]) == 0
    assert picture(folder) == picture(finished)
    assert not (folder / "canvas.zarr").exists()
    ours, theirs = CanvasView(folder), CanvasView(finished)
    assert ours.state.digest == theirs.state.digest
    for level in ours.state.buffers:
        height = ours.state.keys[f"plan.levels.{level}"][0]  # type: ignore[index]
        np.testing.assert_array_equal(ours.read(level, 0, height), theirs.read(level, 0, height))
    secrets = (b"told-to-nobody", b"an-owner")
    written = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
    store = object_client.connect(s3_url)
    written += [store.get(o["path"]).bytes().to_bytes() for o in store.list().collect()]
    assert not [data for data in written for secret in secrets if secret in data]


def test_killed_run_continues_on_another_machine(
    finished: Path,  # noqa: F811
    argv: list[str],
    s3_url: str,
    tmp_path: Path,
) -> None:
    folders = [tmp_path / name for name in ("killed", "another")]
    with started([*argv, f"--output.folder={folders[0]}"], tmp_path) as process:
        while process.poll() is None and commits_of(s3_url) < 2:
            time.sleep(0.1)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folders[0] / "report.json").exists()
    shutil.rmtree(folders[0])  # with the machine
    assert generate_large.main([*argv, f"--output.folder={folders[1]}"]) == 0
    assert picture(folders[1]) == picture(finished)
    assert json.loads((folders[1] / "report.json").read_text())["resumed"]


def test_a_machine_that_would_change_the_bytes_is_refused(
    argv: list[str], interrupted: Path, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = object_client.connect(s3_url)
    began = json.loads(store.get("records/environment.json").bytes().to_bytes())
    store.put("records/environment.json", json.dumps(began | {"device": "cuda"}).encode())
    assert generate_large.main([*argv, f"--output.folder={tmp_path / 'another'}"]) == 1
    assert "device was cuda, now cpu" in capsys.readouterr().err


def test_finished_run_is_seen_and_completed_anywhere(
    finished: Path,  # noqa: F811
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert generate_large.main([*argv, f"--output.folder={first}"]) == 0
    assert generate_large.main([*argv, f"--output.folder={first}"]) == 0
    assert "nothing is missing" in capsys.readouterr().err
    assert generate_large.main([*argv, f"--output.folder={second}"]) == 0
    assert picture(second) == picture(finished)
    assert json.loads((second / "report.json").read_text())["tiles"] == 0  # only decoded


def test_export_of_a_run_at_work_and_of_a_finished_one(
    argv: list[str], interrupted: Path, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(interrupted), "--format=png", "--region=0,0,256,256", "--device=cpu"]
    before = open_storage(s3_url).load()
    assert export.main(command) == 0
    assert list((interrupted / "exports").glob("x0_20x_*.png"))
    assert open_storage(s3_url).load() == before
    assert generate_large.main([*argv, f"--output.folder={interrupted}"]) == 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the bucket may be gone by then
    assert export.main(command) == 0
    assert (interrupted / "exports" / "image_x0_y0_256x256.png").exists()


def test_plan_names_the_store_and_asks_it_nothing(
    argv: list[str], s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert generate_large.main([*argv, f"--output.folder={tmp_path / 'run'}", "--plan"]) == 0
    assert f"canvas in {s3_url}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_missing_bucket_is_said_before_any_work(
    argv: list[str], s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = s3_url.replace("canvases", "nobodys")
    assert generate_large.main([*argv, f"--canvas.store={where}", f"--output.folder={tmp_path / 'run'}"]) == 1
    assert "the bucket must be there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_picture_as_reference_is_embedded_once(s3_url: str, tmp_path: Path) -> None:
    """What the first machine's encoder made is what the second continues with."""
    config = RunConfig(canvas=CanvasConfig(store=s3_url), output=OutputConfig(str(tmp_path / "run")))
    assert _kept_grid(config) is None
    grid = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    np.save(tmp_path / STORED, grid)
    open_storage(s3_url).keep(STORED, (tmp_path / STORED).read_bytes())
    np.testing.assert_array_equal(_kept_grid(config), grid)  # type: ignore[arg-type]
