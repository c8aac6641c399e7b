"""The driver: killed at any instant, asked to stop, or started twice. Nothing committed is ever lost."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.launcher import COUNTED, Fault, Started, run
from tests.faults.ledger import Ledger
from tests.faults.scene import Scene

LONG = pytest.mark.faults
RANDOM_MOMENTS = 10
COUNTED_MOMENTS = {
    ("os:fsync", "kill"): 6,
    ("os:replace", "kill"): 4,
    ("os:replace", "kill after"): 4,
    ("engine.images.ome_zarr:Image.read", "kill"): 4,
    ("engine.canvas.canvas:Canvas.commit", "kill after"): 2,
}
"""Functions and how many of their calls are drawn: 20, and 10 moments at random make 30."""
NAMES = {
    ("os:fsync", "kill"): "before an fsync (commits, exports)",
    ("os:replace", "kill"): "before a rename (chunks, state.json, exports)",
    ("os:replace", "kill after"): "after a rename",
    ("engine.images.ome_zarr:Image.read", "kill"): "inside an export",
    ("engine.canvas.canvas:Canvas.commit", "kill after"): "after a commit",
}
SHORT = (("os:replace", "kill"), ("engine.images.ome_zarr:Image.read", "kill"))
INSTANTS = [
    pytest.param(at, act, number, marks=() if number == 0 and (at, act) in SHORT else LONG)
    for (at, act), count in COUNTED_MOMENTS.items()
    for number in range(count)
]


def commits(folder: Path) -> int:
    state = folder / "state.json"
    return json.loads(state.read_text())["commits"] if state.exists() else 0


@pytest.mark.parametrize(("at", "act", "number"), INSTANTS)
def test_sigkill_at_a_chosen_instant(
    scene: Scene, ledger: Ledger, tmp_path: Path, at: str, act: str, number: int
) -> None:
    call = random.Random(f"2026/{at}/{act}/{number}").randint(1, scene.counts[at])
    with ledger.trial("driver", f"SIGKILL {NAMES[at, act]}") as trial:  # type: ignore[index]
        code, said = run(scene.argv(tmp_path / "run"), tmp_path / "log", Fault(at, call, act))  # type: ignore[arg-type]
        assert code == -signal.SIGKILL, said
        scene.assert_resumes(tmp_path / "run", tmp_path / "log")
        trial.outcome = "resumed"


@LONG
@pytest.mark.parametrize("number", range(RANDOM_MOMENTS))
def test_sigkill_at_a_random_moment(scene: Scene, ledger: Ledger, tmp_path: Path, number: int) -> None:
    delay = random.Random(f"2026/{number}").uniform(0, 0.9) * scene.seconds
    with ledger.trial("driver", "SIGKILL at a random moment") as trial:
        for attempt in range(5):  # a run that was faster than the undisturbed one is over before the signal
            started = Started(scene.argv(tmp_path / str(attempt) / "run"), tmp_path / "log")
            time.sleep(delay)
            started.send(signal.SIGKILL)
            if started.end()[0] == -signal.SIGKILL:
                break
            delay /= 2
        else:
            pytest.fail("no run was caught at work")
        scene.assert_resumes(tmp_path / str(attempt) / "run", tmp_path / "log")
        trial.outcome = "resumed"


@LONG
def test_sigkill_again_and_again(scene: Scene, ledger: Ledger, tmp_path: Path) -> None:
    """Every start is killed before its third commit or rename of an export, until one has nothing left to lose."""
    with ledger.trial("driver", "SIGKILL of every resume, until the run is done") as trial:
        kills = 0
        while True:
            code, said = run(scene.argv(tmp_path / "run"), tmp_path / "log", Fault("os:replace", 25, "kill"))
            if code == 0:
                break
            assert code == -signal.SIGKILL, said
            kills += 1
            assert kills < 60
        assert kills > 1
        scene.assert_same(tmp_path / "run")
        trial.outcome = f"done at start {kills + 1}"


@pytest.mark.parametrize(
    ("when", "at", "call"),
    [
        ("inside a step", "engine.canvas.canvas:Canvas.write", 4),
        pytest.param("while the model is read", "engine.generation.run:load_model", 1, marks=LONG),
        pytest.param("inside a commit", "os:fsync", 60, marks=LONG),
        pytest.param("inside an export", "engine.images.formats:write_dzi", 1, marks=LONG),
    ],
)
def test_sigterm_says_how_to_resume(
    scene: Scene, ledger: Ledger, tmp_path: Path, when: str, at: str, call: int
) -> None:
    folder = tmp_path / "run"
    with ledger.trial("driver", f"SIGTERM {when}") as trial:
        code, said = run(scene.argv(folder), tmp_path / "log", Fault(at, call, "term"))
        assert code == 143, said
        assert "run the same command again to continue" in said
        assert "Traceback" not in said
        scene.assert_resumes(folder, tmp_path / "log")
        trial.outcome = "exit code 143, says how to resume; resumed"


def test_second_run_on_a_folder_is_refused_at_once(scene: Scene, ledger: Ledger, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with ledger.trial("driver", "a second run on the folder while the first lives") as trial:
        first = Started(scene.argv(folder), tmp_path / "first.log", Fault(COUNTED[3], 2, "sleep"))
        while first.running and commits(folder) < 1:
            time.sleep(0.01)
        code, said = run(scene.argv(folder), tmp_path / "log")
        assert code == 1
        assert "one run at a time" in said
        assert first.running
        first.send(signal.SIGKILL)
        first.end()
        scene.assert_resumes(folder, tmp_path / "log")  # the dead one's lock does not block
        trial.outcome = "refused, exit code 1; the lock of the killed first run did not block the next"
