"""The shared virtual clock of benchmarks.sampling.cohort, against what can be worked out by hand."""

import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.sampling.cohort import measure
from benchmarks.support.shared_replicas import SharedReplicas
from engine.sampling.denoiser import TileBatch

BATCH_S = 6.4
"""Of 16 tiles with w > 0, so that one tile without takes 0.2 s."""


def batches(count: int) -> Iterator[TileBatch]:
    for number in range(count):
        zeros = np.zeros((1, 3, 2, 2), np.float32)
        yield TileBatch(f"joint/t=1/20x/{number}", (number,), zeros, 1, 0.5, zeros, 0, 0.0)


def led(replicas: SharedReplicas, counts: list[int]) -> list[list[str]]:
    """Let threads ask for so many batches each, all begun before the first waits; return the keys of their answers."""
    found: list[list[str]] = [[] for _ in counts]
    for _ in counts:
        replicas.joined(1)

    def ask(number: int) -> None:
        found[number] = [answer.key for answer in replicas.denoise(batches(counts[number]))]
        replicas.joined(-1)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def free(replicas: int) -> SharedReplicas:
    """Replicas of a coordinator whose work takes no time."""
    return SharedReplicas(replicas, BATCH_S, 0.0, clock=lambda: 0.0, own_clock=lambda: 0.0)


@pytest.mark.parametrize(("counts", "workers"), [([12], 4), ([13], 4), ([3], 8), ([6, 6], 4), ([8, 1, 7], 4)])
def test_free_coordinators_leave_only_the_compute(counts: list[int], workers: int) -> None:
    replicas = free(workers)
    assert led(replicas, counts) == [[batch.key for batch in batches(count)] for count in counts]
    assert replicas.computed_s == pytest.approx(sum(counts) * 0.2)
    assert replicas.now == pytest.approx(math.ceil(sum(counts) / workers) * 0.2)
    assert replicas.skipped_s == pytest.approx(replicas.now)


def test_pictures_side_by_side_fill_each_others_gaps() -> None:
    """Two pictures that each ask for one batch at a time keep two replicas busy; one keeps one."""

    def one_at_a_time(replicas: SharedReplicas) -> None:
        for _ in range(5):
            list(replicas.denoise(batches(1)))
        replicas.joined(-1)

    for count in (1, 2):
        replicas = free(2)
        for _ in range(count):
            replicas.joined(1)
        threads = [threading.Thread(target=one_at_a_time, args=(replicas,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert replicas.now == pytest.approx(5 * 0.2)
        assert replicas.computed_s / (2 * replicas.now) == pytest.approx(count / 2)


def test_a_coordinator_makes_whole_pictures() -> None:
    found = measure(256, 2, 2, 2)
    assert found["pictures"] == 2
    assert 0 < float(found["efficiency"]) < 1  # type: ignore[arg-type]
    assert float(found["batches_per_picture"]) == measure(256, 1, 1, 1)["batches_per_picture"]  # type: ignore[arg-type]
