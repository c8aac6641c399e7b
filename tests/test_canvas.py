"""The canvas on disk: what is committed stays readable, whatever interrupts; every loss has a clear error."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.canvas import BAND, Canvas, Progress, canvas_nbytes
from engine.errors import CanvasError

LEVELS = {"1.25x": (64, 80), "20x": (520, 300)}
KEYS: dict[str, object] = {"sampling.seed": 0, "canvas.levels": ("1.25x", "20x"), "model.source": "demo"}


def rows_of(step: int, level: str, levels: dict[str, tuple[int, int]] = LEVELS) -> np.ndarray:
    """A level's latents after a step: a closed form, so that any process can check them."""
    h, w = levels[level]
    y, x = np.mgrid[:h, :w].astype(np.float32)
    return np.stack([y + step, x - step, y * 0 + step]).astype(np.float32)


def write_step(canvas: Canvas, step: int, names: tuple[str, ...] = tuple(LEVELS)) -> None:
    for name in names:
        rows = rows_of(step, name)
        for y0 in range(0, rows.shape[1], BAND):
            canvas.write(name, y0, rows[:, y0 : y0 + BAND])


def run_of(folder: Path, steps: int) -> Path:
    with Canvas.open(folder, KEYS, LEVELS) as canvas:
        for step in range(1, steps + 1):
            write_step(canvas, step)
            canvas.commit(0, step)
    return folder


def assert_holds(canvas: Canvas, step: int) -> None:
    for name, (h, _) in LEVELS.items():
        np.testing.assert_array_equal(canvas.read(name, 0, h), rows_of(step, name))


def chunk(folder: Path, array: str, index: str) -> Path:
    return folder / "canvas.zarr" / array / "c" / index


def test_continues_where_it_was_committed(tmp_path: Path):
    folder = tmp_path / "deep" / "run"
    with Canvas.open(folder, KEYS, LEVELS) as canvas:
        assert canvas.fresh
        write_step(canvas, 1)
        canvas.commit(0, 1)
        digest = canvas.digest
    with Canvas.open(folder, KEYS, LEVELS) as canvas:
        assert not canvas.fresh
        assert canvas.progress == Progress(pass_index=0, steps=1)
        assert canvas.digest == digest
        assert_holds(canvas, 1)
        np.testing.assert_array_equal(canvas.read("20x", 250, 270), rows_of(1, "20x")[:, 250:270])


def test_half_written_exports_do_not_block_a_run(tmp_path: Path):
    run_of(tmp_path, 1)
    (tmp_path / "image_files.partial" / "0").mkdir(parents=True)
    (tmp_path / "image.tiff.partial").write_bytes(b"half")
    with Canvas.open(tmp_path, KEYS, LEVELS):
        assert not list(tmp_path.glob("*.partial"))


def test_written_rows_count_only_after_commit(tmp_path: Path):
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        write_step(canvas, 1)
        with pytest.raises(ValueError, match="must be committed before"):
            canvas.read("20x", 0, 1)
        canvas.commit(0, 1)
        write_step(canvas, 2)
        assert_holds(canvas, 1)
        canvas.commit(0, 2)
        assert_holds(canvas, 2)


def test_level_left_out_of_a_step_keeps_its_buffer(tmp_path: Path):
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        write_step(canvas, 1)
        canvas.commit(0, 1)
        write_step(canvas, 2, ("20x",))
        canvas.commit(1, 0)
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        np.testing.assert_array_equal(canvas.read("1.25x", 0, 64), rows_of(1, "1.25x"))
        np.testing.assert_array_equal(canvas.read("20x", 0, 520), rows_of(2, "20x"))


def test_levels_can_be_published_one_by_one(tmp_path: Path):
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        write_step(canvas, 1)
        canvas.commit(0, 1, levels=["1.25x"])
        np.testing.assert_array_equal(canvas.read("1.25x", 0, 64), rows_of(1, "1.25x"))
        with pytest.raises(ValueError, match="must be committed before"):
            canvas.read("20x", 0, 1)
        canvas.commit(0, 2)
        assert_holds(canvas, 1)


def test_decoding_is_recorded_and_forgotten_by_the_next_commit(tmp_path: Path):
    folder = run_of(tmp_path / "run", 1)
    with Canvas.open(folder, KEYS, LEVELS) as canvas:
        canvas.record(decoded_px=1024)
        canvas.record(finished=True)
    with Canvas.open(folder, KEYS, LEVELS) as canvas:
        assert canvas.progress == Progress(0, 1, decoded_px=1024, finished=True)
        write_step(canvas, 2)
        canvas.commit(0, 2)
        assert canvas.progress == Progress(0, 2)


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


@pytest.mark.parametrize(("harm", "says"), [("flip", "damaged"), ("cut", "damaged"), ("delete", "missing")])
def test_lost_chunk_is_named(tmp_path: Path, harm: str, says: str):
    run_of(tmp_path, 2)
    path = chunk(tmp_path, "20x/latent_1", "0/1/1")
    data = bytearray(path.read_bytes())
    data[12345] ^= 1
    {"flip": lambda: path.write_bytes(data), "cut": lambda: path.write_bytes(data[:999]), "delete": path.unlink}[harm]()
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        canvas.read("20x", 0, BAND)  # the other bands are still good
        with pytest.raises(CanvasError, match=rf"chunk c/0/1/1 of 20x/latent_1 is {says}.*pass 0, step 2"):
            canvas.read("20x", 0, 520)


def test_lost_array_is_named(tmp_path: Path):
    run_of(tmp_path, 1)
    (tmp_path / "canvas.zarr" / "20x" / "latent_1" / "zarr.json").write_text("{")
    with pytest.raises(CanvasError, match="array 20x/latent_1 must be there"):
        Canvas.open(tmp_path, KEYS, LEVELS)


def test_orphans_of_killed_writers_are_swept(tmp_path: Path):
    run_of(tmp_path, 1)
    orphans = [
        chunk(tmp_path, "20x/latent_1", "0/0") / "0.abc.partial",
        tmp_path / "image.ome.zarr" / "0" / "c" / "0.abc.partial",
        tmp_path / "image.tiff.partial",
    ]
    for folder in (orphan.parent for orphan in orphans[:2]):
        folder.mkdir(parents=True)
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


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_canvas import KEYS, LEVELS, Canvas, write_step
canvas = Canvas.open(Path({folder!r}), KEYS, LEVELS)
step = canvas.progress.steps
while True:
    print(step, flush=True)
    step += 1
    write_step(canvas, step)
    canvas.commit(0, step)
"""


def test_sigkill_at_any_instant_leaves_a_committed_step(tmp_path: Path):
    tests = Path(__file__).parent
    code = WRITER.format(root=str(tests.parent), tests=str(tests), folder=str(tmp_path / "run"))
    for delay in (0.0, 0.007, 0.019, 0.041, 0.08, 0.15):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        promised = max(int(process.stdout.readline()) for _ in range(2))
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Canvas.open(tmp_path / "run", KEYS, LEVELS) as canvas:  # the dead process's lock does not block
            assert canvas.progress.steps >= promised > 0
            assert_holds(canvas, canvas.progress.steps)


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
