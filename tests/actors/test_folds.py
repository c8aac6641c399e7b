"""Jobs on Ray: every one is answered, what one raises is raised here, and a lost worker's job is done again."""

import os
from pathlib import Path

import pytest

from actors.backend import do_jobs
from engine.core.errors import ReplicaLostError
from mil.errors import SplitError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_jobs_are_answered_and_a_lost_worker_is_replaced(tmp_path: Path) -> None:
    def work(number: int) -> tuple[int, int]:
        seen = tmp_path / str(number)
        if number == 1 and not seen.exists():
            seen.touch()
            os._exit(1)
        return number, os.getpid()

    found = dict(do_jobs(work, [0, 1, 2], num_cpus=1))
    assert sorted(found) == [0, 1, 2]
    assert os.getpid() not in found.values()


def test_what_a_job_raises_is_raised() -> None:
    def work(number: int) -> int:
        raise SplitError(f"job {number} must not be")

    with pytest.raises(SplitError, match="job 7 must not be"):
        list(do_jobs(work, [7], num_cpus=1))


def test_a_job_whose_workers_die_ends() -> None:
    def work(number: int) -> int:
        os._exit(number)

    with pytest.raises(ReplicaLostError, match="each died"):
        list(do_jobs(work, [1], num_cpus=1, attempts=1))
