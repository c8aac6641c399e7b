"""The virtual clock of benchmarks.sampling.scaling, against what can be worked out by hand."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.sampling import scaling
from benchmarks.sampling.scaling import SimulatedReplicas
from engine.sampling.denoiser import DecodeBatch, TileBatch


def batches(count: int) -> Iterator[TileBatch]:
    for number in range(count):
        zeros = np.zeros((1, 3, 2, 2), np.float32)
        yield TileBatch(f"joint/t=1/20x/{number}", (number,), zeros, 1, 0.5, zeros, 0, 0.0)


class Ticking:
    """A clock that goes on by `tick` each time it is looked at."""

    def __init__(self, tick: float) -> None:
        self.tick, self.now = tick, 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def replicas(seconds: list[float], call_s: float = 0.0, tick: float = 0.0, barriers: bool = False) -> SimulatedReplicas:
    return SimulatedReplicas(np.array(seconds), call_s, barriers, Ticking(tick))


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (12, 4), (13, 4), (3, 8)])
def test_a_free_coordinator_leaves_only_the_compute(count: int, workers: int) -> None:
    r = replicas([0.2] * workers)
    assert [a.key for a in r.denoise(batches(count))] == [b.key for b in batches(count)]
    assert r.now == pytest.approx(math.ceil(count / workers) * 0.2)
    assert (r.busy_s, r.batches) == (0.0, count)


def test_a_slow_coordinator_is_what_limits() -> None:
    r = replicas([0.2] * 50, call_s=0.1, tick=1e-5)
    list(r.denoise(batches(30)))
    assert r.now == pytest.approx(30 * 0.1 + 0.2, rel=0.01)
    assert r.busy_s == pytest.approx(3.0, rel=0.01)


def test_time_is_the_machines_own_but_for_what_is_skipped() -> None:
    """The coordinator's work counts once; with a free one nothing but the compute is left to wait for."""
    r = replicas([1.0], tick=0.01)
    clock = r.clock
    start = clock.now  # type: ignore[attr-defined]
    for _ in r.denoise(batches(5)):
        r.tick()
    assert 5.0 < r.now < 5.5
    assert r.now == pytest.approx(r.busy_s + r.waited_s)
    passed = clock.now - start  # type: ignore[attr-defined]
    assert r.busy_s < passed  # looks while waiting belong to the wait


def test_work_in_threads_takes_real_time_before_any_is_skipped() -> None:
    """Threads that need longer than the replica: time passes as the machine's does until they are done."""
    r = replicas([0.2], tick=0.001)
    busy_until = 0.1
    r.idle = lambda: r.now >= busy_until
    answers = r.denoise(batches(2))
    next(answers)
    looked = r.clock.now  # type: ignore[attr-defined]
    assert looked > busy_until  # up to there it was not skipped
    assert 0.2 <= r.now < 0.25
    r.idle = lambda: False
    next(answers)
    assert r.clock.now - looked > 0.15  # type: ignore[attr-defined]
    assert 0.4 <= r.now < 0.45


def test_a_picture_is_decoded_beside_the_tiles() -> None:
    """Windows asked for while tiles are under way go out at once, and the tiles go on while they are waited for."""
    r = replicas([0.2] * 4)
    zeros = np.zeros((1, 3, 2, 2), np.float32)
    tiles = r.denoise(batches(23))
    next(tiles)
    windows = r.decode(iter([DecodeBatch("guide/0", (0,), zeros)]))
    assert [w.key for w in windows] == ["guide/0"]
    assert r.now == pytest.approx(0.8)  # there was room at 0.4, behind one batch
    assert len(list(tiles)) == 22
    assert r.now == pytest.approx(24 * 0.2 / 4)  # all four were busy to the end


def test_time_never_runs_back_and_answers_come_after_their_compute() -> None:
    r = replicas([0.3, 0.1, 0.2], call_s=0.01, tick=0.001)
    seen = [r.tick() for _ in r.denoise(batches(20))]
    assert seen == sorted(seen)
    assert seen[0] >= 0.1
    rate = 1 / 0.3 + 1 / 0.1 + 1 / 0.2
    assert r.now >= 20 / rate  # nobody computes faster than its speed


def test_batches_that_wait_for_answers_are_asked_for_again() -> None:
    """The second half is there when the first is answered: a barrier in the data costs one batch's time."""
    taken = 0

    def source() -> Iterator[TileBatch | None]:
        for number, batch in enumerate(batches(8)):
            while number >= 4 and taken < 4:
                yield None
            yield batch

    r = replicas([0.2] * 8)
    for _ in r.denoise(source()):
        taken += 1
    assert (taken, r.now) == (8, pytest.approx(0.4))


def test_barriers_hold_the_next_step_back() -> None:
    def two_steps() -> Iterator[TileBatch]:
        for t in (2, 1):
            zeros = np.zeros((1, 3, 2, 2), np.float32)
            for number in range(3):
                yield TileBatch(f"joint/t={t}/20x/{number}", (number,), zeros, t, 0.5, zeros, 0, 0.0)

    spent = []
    for barriers in (False, True):
        r = replicas([0.2, 0.2], barriers=barriers)
        list(r.denoise(two_steps()))
        spent.append(r.now)
    assert spent == pytest.approx([0.6, 0.8])


def test_figures_hang_together() -> None:
    row = scaling.measure(512, np.full(2, 5.0), 0.002, steps=4, clock="cpu")
    compute = float(row["batches_per_step"]) * 5.0  # type: ignore[arg-type]
    efficiency, passed = float(row["efficiency"]), float(row["seconds_per_step"])  # type: ignore[arg-type]
    assert efficiency == pytest.approx(compute / (2 * passed))
    assert 0.3 < efficiency <= 1
    assert row["batches_per_step"] == 3  # the guide's tile, its decoding, and nine tiles
    assert 0.9 * efficiency <= float(row["steady_efficiency"]) <= 1.01  # type: ignore[arg-type]
    assert row["coordinator_busy"] == pytest.approx(float(row["coordinator_s_per_step"]) / passed)  # type: ignore[arg-type]
    assert row["saturates_at_replicas"] == pytest.approx(compute / float(row["coordinator_s_per_step"]))  # type: ignore[arg-type]
    assert row["canvas_megabytes_per_step"] == pytest.approx(3 * 3 * 4 * (128**2 + 64**2) / 1e6)
