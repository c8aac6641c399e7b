"""One cohort and one finished study for all tests of the commands; they read them only."""

from pathlib import Path

import pytest

from mil import train as train_command
from tests.support.known_cohort import KnownCohort, write_cohort
from tests.support.known_study import QUICK


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownCohort:
    return write_cohort(tmp_path_factory.mktemp("cohort"), 32)


@pytest.fixture(scope="session")
def study(known: KnownCohort) -> Path:
    folder = known.features.parent / "run"
    argv = ["--task=hrd", f"--features={known.features}", f"--labels={known.labels}", f"--output.folder={folder}"]
    assert train_command.main([*argv, *QUICK]) == 0
    return folder
