"""What all fault tests share: the inputs, the undisturbed run, and the ledger of trials."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import launcher
from tests.faults.ledger import Ledger
from tests.faults.scene import LONG_RUN, Scene, bytes_of_run, make_inputs

LEDGER = Ledger()
LEFT_OUT: list[pytest.Item] = []
"""Fault tests that were not run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-record", help="write what was tried and lost to this JSON file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test here is up to five whole runs: a busy machine needs longer for it than for the others."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(1800))


def pytest_deselected(items: list[pytest.Item]) -> None:
    LEFT_OUT.extend(items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        LEDGER.skipped += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--faults-record", default=None)
    if path and LEDGER.trials:
        LEDGER.left_out = len(LEFT_OUT)
        LEDGER.save(Path(path))


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    return LEDGER


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("scene")
    flags = make_inputs(folder)
    bare = Scene(flags, {}, {}, 0)
    code, said = launcher.run(bare.argv(folder / "run"), folder / "log", counts=folder / "counts.json")
    assert code == 0, said
    counts = json.loads((folder / "counts.json").read_text())
    return Scene(flags, bytes_of_run(folder / "run"), counts["calls"], counts["seconds"])


@pytest.fixture(scope="session")
def long_scene(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The undisturbed run in 50 steps."""
    folder = tmp_path_factory.mktemp("long")
    flags = [*scene.flags, LONG_RUN]
    code, said = launcher.run(Scene(flags, {}, {}, 0).argv(folder / "run"), folder / "log")
    assert code == 0, said
    return Scene(flags, bytes_of_run(folder / "run"), {}, 0)
