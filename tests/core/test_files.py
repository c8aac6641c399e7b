"""Which folders a run accepts: its own, one process at a time; everything else is refused and left alone."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from engine.canvas.canvas import Canvas
from engine.core.errors import CanvasError, CanvasMismatchError
from tests.support.storage_contract import KEYS, LEVELS, assert_holds, chunk, run_of, write_step


def test_other_plan_is_refused_with_its_keys(tmp_path: Path):
    run_of(tmp_path, 1)
    with pytest.raises(CanvasMismatchError) as error:
        Canvas.open(tmp_path, KEYS | {"sampling.seed": 7, "new": 1}, LEVELS | {"20x": (520, 304)})
    for part in ("sampling.seed was 0, now 7", "new was absent, now 1", "plan.levels.20x was [520, 300]"):
        assert part in str(error.value)
    assert "model.source" not in str(error.value)
    Canvas.open(tmp_path, KEYS, LEVELS).close()


def test_a_run_that_lacks_a_newer_key_goes_on_as_it_was_begun(tmp_path: Path):
    run_of(tmp_path, 1)
    with pytest.raises(CanvasMismatchError, match="sampling.from_guide was 0, now 600"):
        Canvas.open(tmp_path, KEYS | {"sampling.from_guide": 600}, LEVELS)
    Canvas.open(tmp_path, KEYS | {"sampling.from_guide": 0, "sampling.solver": "ddim"}, LEVELS).close()


def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CanvasError, match=r"thesis\.tex.*another output\.folder"):
        Canvas.open(tmp_path, KEYS, LEVELS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_foreign_state_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "state.json").write_text('{"epoch": 3}')
    with pytest.raises(CanvasError, match=r"state\.json"):
        Canvas.open(tmp_path, KEYS, LEVELS)
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CanvasError, match=r"run.*output\.folder"):
        Canvas.open(tmp_path / "run", KEYS, LEVELS)


def test_run_that_died_while_being_created_is_created_again(tmp_path: Path):
    Canvas.open(tmp_path, KEYS, LEVELS).close()
    (tmp_path / "state.json").unlink()
    shutil.rmtree(tmp_path / "canvas.zarr" / "20x" / "latent_1")
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        assert canvas.fresh


def test_latents_without_state_are_not_overwritten(tmp_path: Path):
    run_of(tmp_path, 1)
    (tmp_path / "state.json").unlink()
    with pytest.raises(CanvasError, match=r"must have a state\.json"):
        Canvas.open(tmp_path, KEYS, LEVELS)
    assert chunk(tmp_path, "20x/latent_0", "0/0/0").exists()


@pytest.mark.parametrize("harm", ["cut", "empty", "flip", "binary", "version"])
def test_garbled_state_names_the_file(tmp_path: Path, harm: str):
    run_of(tmp_path, 1)
    state = tmp_path / "state.json"
    good = state.read_bytes()
    state.write_bytes({
        "cut": good[: len(good) // 2],
        "empty": b"",
        "flip": good.replace(b'"steps": 1', b'"steps": 3'),
        "binary": b"\xff\x00" * 40,
        "version": good.replace(b'"version": 1', b'"version": 99'),
    }[harm])  # fmt: skip
    with pytest.raises(CanvasError, match=r"state\.json must.*output\.folder"):
        Canvas.open(tmp_path, KEYS, LEVELS)


@pytest.mark.parametrize("behind", [1, 2])
def test_state_older_than_its_latents_is_refused(tmp_path: Path, behind: int):
    """An old copy put back: its buffer was written again, wholly or in part; it would give another picture."""
    run_of(tmp_path, 2)
    old = (tmp_path / "state.json").read_bytes()
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        for step in range(3, 3 + behind):
            write_step(canvas, step)
            canvas.commit(0, step)
        newest = (tmp_path / "state.json").read_bytes()
        if behind == 1:
            write_step(canvas, 4, ("20x",))  # not committed
    (tmp_path / "state.json").write_bytes(old)
    with pytest.raises(CanvasError, match=r"state\.json must be the newest.*of commit 2.*(again|commit 4)"):
        Canvas.open(tmp_path, KEYS, LEVELS)
    (tmp_path / "state.json").write_bytes(newest)
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        assert_holds(canvas, 2 + behind)


def test_state_one_commit_behind_does_that_step_again(tmp_path: Path):
    run_of(tmp_path, 2)
    old = (tmp_path / "state.json").read_bytes()
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        write_step(canvas, 3)
        canvas.commit(0, 3)
    (tmp_path / "state.json").write_bytes(old)
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        assert_holds(canvas, 2)
        write_step(canvas, 3)
        canvas.commit(0, 3)
        assert_holds(canvas, 3)


def test_second_run_on_the_folder_is_refused_while_the_first_lives(tmp_path: Path):
    canvas = Canvas.open(tmp_path, KEYS, LEVELS)
    with pytest.raises(CanvasError, match=f"one run at a time.*process {os.getpid()}"):
        Canvas.open(tmp_path, KEYS, LEVELS)
    canvas.close()
    Canvas.open(tmp_path, KEYS, LEVELS).close()


def test_failed_open_lets_the_folder_go(tmp_path: Path):
    run_of(tmp_path, 1)
    with pytest.raises(CanvasMismatchError):
        Canvas.open(tmp_path, {}, LEVELS)
    Canvas.open(tmp_path, KEYS, LEVELS).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="root drops its rights here; others may not")
def test_read_only_folder_is_refused():
    """As another user, because root may write everywhere; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        os.seteuid(65534)
        try:
            with pytest.raises(CanvasError, match=r"run\.lock.*permission.*choose another folder"):
                Canvas.open(folder, KEYS, LEVELS)
        finally:
            os.seteuid(0)
