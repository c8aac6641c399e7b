"""Files that are damaged, lost or old: an error that names them, and the same bytes once they are put right."""

import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.faults.launcher import Fault, run
from tests.faults.ledger import Ledger
from tests.faults.scene import Scene

LONG = pytest.mark.faults
COMMIT = "engine.canvas.canvas:Canvas.commit"


Half = Callable[[int], Path]
"""Gives the folder of a run that was killed right after a commit."""


@pytest.fixture(scope="module")
def half(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Half:
    """Commit 1 is the noise, 2 and 3 are the steps of 5x; 4 begins 20x from it, 5 and 6 are its steps; then refine."""

    @cache
    def killed_after(commit: int) -> Path:
        folder = tmp_path_factory.mktemp("half") / "run"
        code, said = run(scene.argv(folder), folder.parent / "log", Fault(COMMIT, commit, "kill after"))
        assert code == -signal.SIGKILL, said
        return folder

    return killed_after


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def chunks(folder: Path) -> list[Path]:
    """The finest level's chunks of the commit that counts; the sixth one went into the first buffer."""
    return sorted(p for p in (folder / "canvas.zarr" / "20x" / "latent_0" / "c").rglob("*") if p.is_file())


def first_chunk(folder: Path) -> Path:
    return chunks(folder)[0]


def state_file(folder: Path) -> Path:
    return folder / "state.json"


CHUNK_SAID, STATE_SAID = "chunk c/0/0/0 of 20x/latent_0 is", "state.json"


@LONG
@pytest.mark.parametrize(
    ("name", "victim_of", "harm", "named"),
    [
        ("a flipped byte in a chunk of the canvas", first_chunk, flip, CHUNK_SAID),
        ("a chunk of the canvas cut short", first_chunk, halve, CHUNK_SAID),
        ("a deleted chunk of the canvas", first_chunk, Path.unlink, CHUNK_SAID),
        ("a half-written state.json", state_file, halve, STATE_SAID),
        ("a flipped byte in state.json", state_file, flip, STATE_SAID),
        ("a deleted state.json", state_file, Path.unlink, STATE_SAID),
    ],
)
def test_harmed_file(
    scene: Scene, ledger: Ledger, half: Half, tmp_path: Path,
    name: str, victim_of: Callable[[Path], Path], harm: Callable[[Path], None], named: str,
) -> None:  # fmt: skip
    folder = shutil.copytree(half(6), tmp_path / "run")
    with ledger.trial("damage", name) as trial:
        victim = victim_of(folder)
        good = victim.read_bytes()
        harm(victim)
        code, said = run(scene.argv(folder), tmp_path / "log")
        assert code == 1
        assert named in said
        assert "Traceback" not in said
        victim.write_bytes(good)
        scene.assert_resumes(folder, tmp_path / "log")
        trial.outcome = "refused, naming the file; resumed when it was put back"


@pytest.mark.parametrize("behind", [pytest.param(1, marks=LONG), 2])
def test_stale_state(scene: Scene, ledger: Ledger, half: Half, tmp_path: Path, behind: int) -> None:
    """One commit behind, the buffer it names still holds its step; two behind, it was written again."""
    folder = shutil.copytree(half(7), tmp_path / "run")
    with ledger.trial("damage", f"a stale state.json, {behind} commit{'s' * (behind > 1)} behind") as trial:
        newest = (folder / "state.json").read_bytes()
        shutil.copy(half(7 - behind) / "state.json", folder / "state.json")
        if behind > 1:
            code, said = run(scene.argv(folder), tmp_path / "log")
            assert code == 1
            assert "state.json must be the newest there was" in said
            (folder / "state.json").write_bytes(newest)
        scene.assert_resumes(folder, tmp_path / "log")
        trial.outcome = "refused; resumed when the newest was put back" if behind > 1 else "the step was done again"


@LONG
def test_run_made_whole_by_a_restored_folder(scene: Scene, ledger: Ledger, half: Half, tmp_path: Path) -> None:
    """An older copy of the whole folder is consistent in itself."""
    folder = shutil.copytree(half(4), tmp_path / "run")
    with ledger.trial("damage", "the whole folder put back from an older copy") as trial:
        scene.assert_resumes(folder, tmp_path / "log")
        trial.outcome = "resumed from there"


@LONG
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("a flipped byte in a chunk of the decoded picture", flip),
        ("a deleted chunk of the decoded picture", Path.unlink),
    ],
)
def test_harmed_picture(scene: Scene, ledger: Ledger, tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    folder = tmp_path / "run"
    with ledger.trial("damage", name) as trial:
        code, said = run(scene.argv(folder), tmp_path / "log", Fault("engine.generation.outputs:export", 1, "kill"))
        assert code == -signal.SIGKILL, said
        harm(folder / "image.ome.zarr" / "0" / "c" / "0" / "0" / "0")
        code, said = run(scene.argv(folder), tmp_path / "log")
        assert code == 1
        assert "image.ome.zarr: chunk c/0/0/0 of level 0 is" in said
        shutil.rmtree(folder / "image.ome.zarr")
        scene.assert_resumes(folder, tmp_path / "log")
        trial.outcome = "refused, naming the chunk; decoded again from the canvas"
