"""Disks that are full or read-only: the run stops with what to do, and the same command goes on where it was."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.launcher import Fault, run
from tests.faults.ledger import Ledger
from tests.faults.scene import Scene

LONG = pytest.mark.faults
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own can be mounted by root only")
FULL_AT = {
    "engine.canvas.canvas:Canvas.write": ("a step", 3),
    "engine.canvas.canvas:Canvas.commit": ("a commit", 2),
    "engine.images.ome_zarr:Image.create": ("the begin of decoding", 1),
    "engine.images.ome_zarr:Image.write": ("decoding", 1),
    "engine.images.ome_zarr:Image.build_pyramid": ("the pyramid", 1),
    "engine.images.formats:write_tiff": ("export of TIFF", 1),
    "engine.images.formats:write_ome_tiff": ("export of OME-TIFF", 1),
    "engine.images.formats:write_dzi": ("export of Deep Zoom", 1),
    "engine.images.formats:write_png": ("export of PNG", 1),
    "engine.generation.outputs:write_preview": ("the preview", 1),
    "engine.generation.outputs:write_report": ("the report", 1),
}
"""Function → what it does in words, and at which call of it the disk fills up."""
SHORT = ("engine.canvas.canvas:Canvas.write",)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB, mounted for the test; the run needs half of it."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@ROOT_ONLY
@pytest.mark.parametrize("at", [pytest.param(a, marks=() if a in SHORT else LONG) for a in FULL_AT])
def test_disk_filled_up_by_somebody_else(scene: Scene, ledger: Ledger, disk: Path, tmp_path: Path, at: str) -> None:
    what, call = FULL_AT[at]
    with ledger.trial("disk", f"disk full during {what}") as trial:
        code, said = run(scene.argv(disk / "run"), tmp_path / "log", Fault(at, call, "fill", str(disk)))
        assert code == 1, said
        assert "full" in said
        assert "repeat the same command" in said
        assert "Traceback" not in said
        (disk / "ballast").unlink()
        scene.assert_resumes(disk / "run", tmp_path / "log")
        trial.outcome = "stopped, exit code 1; resumed when there was room"


@LONG
@pytest.mark.parametrize("at", ["engine.canvas.canvas:Canvas.write", "engine.images.formats:write_tiff"])
def test_file_size_limit(scene: Scene, ledger: Ledger, tmp_path: Path, at: str) -> None:
    what, call = FULL_AT[at]
    with ledger.trial("disk", f"file size limit reached during {what}") as trial:
        code, said = run(scene.argv(tmp_path / "run"), tmp_path / "log", Fault(at, call, "limit"))
        assert code == 1, said
        assert "file size limit is full" in said
        assert "Traceback" not in said
        scene.assert_resumes(tmp_path / "run", tmp_path / "log")
        trial.outcome = "stopped, exit code 1; resumed without the limit"


@LONG
@ROOT_ONLY
@pytest.mark.parametrize(
    ("when", "at"),
    [
        ("sampling", "engine.canvas.canvas:Canvas.commit"),
        ("exports", "engine.generation.outputs:export"),
    ],
)
def test_folder_that_became_read_only(
    scene: Scene, ledger: Ledger, disk: Path, tmp_path: Path, when: str, at: str
) -> None:
    with ledger.trial("disk", f"folder read-only at a resume, interrupted while {when}") as trial:
        code, said = run(scene.argv(disk / "run"), tmp_path / "log", Fault(at, 1, "kill"))
        assert code == -signal.SIGKILL, said
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        try:
            code, said = run(scene.argv(disk / "run"), tmp_path / "log")
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert code == 1, said
        assert "no permission to write (Read-only file system)" in said
        assert "Traceback" not in said
        scene.assert_resumes(disk / "run", tmp_path / "log")
        trial.outcome = "refused, exit code 1; resumed when it could be written"
