"""The debug record of writers: every chunk of a step has one, a second one is an error that names both."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from engine.canvas.canvas import BAND, Canvas
from engine.core.errors import CanvasError
from tests.support.chunk_writers import ChunkWriters, record_writers
from tests.support.storage_contract import KEYS, LEVELS, assert_holds, rows_of, write_step


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    record_writers(monkeypatch.setattr)


def test_every_chunk_of_the_last_steps_has_its_writer(tmp_path: Path) -> None:
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        for step in (1, 2, 3):
            write_step(canvas, step)
            canvas.commit(0, step)
        assert_holds(canvas, 3)
    assert sorted(p.name for p in (tmp_path / "writers").iterdir()) == ["2", "3"]
    claims = sorted((tmp_path / "writers" / "3").iterdir())
    chunks = (tmp_path / "canvas.zarr").rglob("latent_0/c/*/*/*")  # commit 3 went into the buffer that 1 went into
    assert [c.name for c in claims] == sorted(".".join(p.parts[-6:]) for p in chunks)
    assert all(f"process {os.getpid()} on " in c.read_text() for c in claims)


def test_a_second_writer_is_an_error_that_names_both(tmp_path: Path) -> None:
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        canvas.write("20x", BAND, rows_of(1, "20x")[:, BAND : 2 * BAND])
        with pytest.raises(
            CanvasError, match=rf"20x\.latent_0\.c\.0\.1\.0 must have one writer.*process {os.getpid()}"
        ):
            canvas.write("20x", BAND, np.zeros((3, BAND, 300), np.float32))
        write_step(canvas, 1, ("1.25x",))


def test_two_processes_that_both_hold_a_lock_that_does_not_lock(tmp_path: Path) -> None:
    mine, theirs = ChunkWriters(tmp_path, 4), ChunkWriters(tmp_path, 4)
    mine.claim(5, "20x/latent_0", 0, 2)
    caught: list[CanvasError] = []

    def other() -> None:
        try:
            theirs.claim(5, "20x/latent_0", 0, 2)
        except CanvasError as error:
            caught.append(error)

    thread = threading.Thread(target=other, name="the other")
    thread.start()
    thread.join()
    assert "MainThread has written it" in str(caught[0])
    assert "now process" in str(caught[0])
    assert "the other" in str(caught[0])


def test_claims_of_a_dead_process_do_not_block_the_step_it_had_begun(tmp_path: Path) -> None:
    for _ in range(2):
        with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
            write_step(canvas, 1, ("20x",))
            assert canvas.fresh
            assert list((tmp_path / "writers" / "1").iterdir())


def test_without_a_record_a_band_may_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with Canvas.open(tmp_path, KEYS, LEVELS) as canvas:
        write_step(canvas, 1)
        write_step(canvas, 1)
    assert canvas.fresh
