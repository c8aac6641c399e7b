"""The canvas on disk: what is committed stays readable, whatever interrupts; every loss has a clear error."""

import errno
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.canvas.canvas import BAND, Canvas, canvas_nbytes
from engine.canvas.run_state import check_run_keys
from engine.core.errors import CanvasError, CanvasMismatchError
from tests.support.storage_contract import (
    KEYS,
    LEVELS,
    Place,
    StorageTests,
    assert_holds,
    chunk,
    rows_of,
    run_of,
    write_step,
)


class TestInTheRunFolder(StorageTests):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(tmp_path)


def test_half_written_exports_do_not_block_a_run(tmp_path: Path):
    run_of(tmp_path, 1)
    (tmp_path / "image_files.partial" / "0").mkdir(parents=True)
    (tmp_path / "image.tiff.partial").write_bytes(b"half")
    with Canvas.open(tmp_path, KEYS, LEVELS):
        assert not list(tmp_path.glob("*.partial"))


def test_levels_can_be_published_one_by_one(tmp_path: Path):
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        write_step(canvas, 1)
        canvas.commit(0, 1, levels=["1.25x"])
        np.testing.assert_array_equal(canvas.read("1.25x", 0, 64), rows_of(1, "1.25x"))
        with pytest.raises(ValueError, match="must be committed before"):
            canvas.read("20x", 0, 1)
        canvas.commit(0, 2)
        assert_holds(canvas, 1)


@pytest.mark.parametrize("rows", [np.zeros((3, 255, 300)), np.zeros((3, 256, 299)), np.zeros((4, 256, 300))])
def test_only_whole_bands_are_written(tmp_path: Path, rows: np.ndarray):
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        with pytest.raises(ValueError, match="must start at a multiple of 256"):
            canvas.write("20x", 0, rows.astype(np.float32))
        with pytest.raises(ValueError, match="must start at a multiple of 256"):
            canvas.write("20x", 100, np.zeros((3, 256, 300), np.float32))


def test_half_written_level_is_not_committed(tmp_path: Path):
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        canvas.write("20x", 256, np.zeros((3, 256, 300), np.float32))
        with pytest.raises(ValueError, match=r"20x must be written whole.*bands \[0, 2\]"):
            canvas.commit(0, 1)
        assert canvas.fresh


def test_nan_from_the_network_is_an_error_at_once(tmp_path: Path):
    rows = np.zeros((3, 64, 80), np.float32)
    rows[1, 2, 3] = np.nan
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas, pytest.raises(CanvasError, match=r"1\.25x.*finite"):
        canvas.write("1.25x", 0, rows)


def test_orphans_of_killed_writers_are_swept(tmp_path: Path):
    run_of(tmp_path, 1)
    orphans = [
        chunk(tmp_path, "20x/latent_1", "0/0") / "0.abc.partial",
        tmp_path / "image.ome.zarr" / "0" / "c" / "0.abc.partial",
        tmp_path / "image.tiff.partial",
        tmp_path / "records" / "guide.partial",
        tmp_path / "live" / "20x.jpg.partial",
    ]
    for folder in (orphan.parent for orphan in orphans):
        folder.mkdir(parents=True, exist_ok=True)
    for orphan in orphans:
        orphan.write_bytes(b"x")
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        assert_holds(canvas, 1)
    assert not any(orphan.exists() for orphan in orphans)


def test_every_instant_of_a_step_can_be_continued(tmp_path: Path):
    """A copy of the folder is what a power cut leaves; the step before is always there."""
    with Canvas.open(tmp_path / "run", KEYS, LEVELS) as canvas:
        for step in (1, 2, 3):
            for name in LEVELS:
                for y0 in range(0, LEVELS[name][0], BAND):
                    canvas.write(name, y0, rows_of(step, name)[:, y0 : y0 + BAND])
                    copy = tmp_path / f"copy-{step}-{name}-{y0}"
                    shutil.copytree(tmp_path / "run", copy)
                    with Canvas.open(copy, KEYS, LEVELS) as left:
                        assert left.progress.steps == step - 1
                        if step > 1:
                            assert_holds(left, step - 1)
                    shutil.rmtree(copy)
            canvas.commit(0, step)


def test_full_disk_keeps_the_committed_step_and_says_how_to_go_on(tmp_path: Path):
    """RLIMIT_FSIZE stops the kernel's write in the middle of a chunk, as a full disk or quota does."""
    run_of(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(CanvasError, match=r"20x/latent_1, rows 0\.\.256.*MiB.*repeat the same command"):
                write_step(canvas, 2, ("20x",))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert_holds(canvas, 1)
        write_step(canvas, 2)  # and the same process can go on once there is room
        canvas.commit(0, 2)
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        assert_holds(canvas, 2)


def test_disk_that_fails_at_fsync_does_not_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_of(tmp_path, 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        write_step(canvas, 2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(CanvasError, match="Nothing committed is lost"):
                canvas.commit(0, 2)
        assert_holds(canvas, 1)
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        assert_holds(canvas, 1)


def test_canvas_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path):
    with pytest.raises(CanvasError, match="must have room for the latents"):
        Canvas.open(tmp_path, KEYS, {"20x": (10_000_000, 10_000_000)})


def test_estimate_is_what_lies_on_disk(tmp_path: Path):
    run_of(tmp_path, 2)
    chunks = [p for p in (tmp_path / "canvas.zarr").rglob("c/*/*/*") if p.is_file()]
    assert sum(p.stat().st_size for p in chunks) == canvas_nbytes(LEVELS)


def test_keys_that_came_and_went_with_a_release_do_not_stop_a_run() -> None:
    old = {"sampling.seed": 0, "guidance.iterations": 20}
    new = {"sampling.seed": 0, "sampling.from_guide": 0, "guidance.cell": 1}
    check_run_keys("run", old, new)
    with pytest.raises(CanvasMismatchError, match="guidance.cell was 1, now 16"):
        check_run_keys("run", old, new | {"guidance.cell": 16})
    with pytest.raises(CanvasMismatchError, match="guidance.strength was 0.5, now absent"):
        check_run_keys("run", old | {"guidance.strength": 0.5}, new)


def test_a_default_that_has_changed_stops_a_run_that_began_with_the_old_one() -> None:
    old: dict[str, object] = {"sampling.from_guide": None}
    check_run_keys("run", old, {"sampling.from_guide": 600})
    check_run_keys("run", old, old)
    with pytest.raises(CanvasMismatchError, match="sampling.from_guide was 600, now 700"):
        check_run_keys("run", old, {"sampling.from_guide": 700})
