"""DenoiserPool: the contract, and the same bytes whatever happens to replicas. Faults are real: signals, overflow."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from actors import pool as pool_module
from actors.batches import PoolStats
from actors.denoiser_actor import pack_model, unpack_model
from actors.pool import DenoiserPool
from engine.core.config import RayConfig
from engine.core.errors import ClusterError, ReplicaLostError
from engine.sampling.denoiser import DenoiseTiles, LocalDenoiser, TileBatch
from tests.support.denoiser_contract import DenoiserContract, bytes_of, decode_batch, tile_batch, tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
BATCHES = 8


class Heard:
    """Counts what a pool tells."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, float]] = []
        self.restarts = 0

    def batch(self, method: str, seconds: float) -> None:
        self.batches.append((method, seconds))

    def restart(self) -> None:
        self.restarts += 1


HEARD = Heard()
"""What the pool `shared` tells."""


@pytest.fixture(scope="module")
def expected() -> list[tuple[str, bytes, bytes]]:
    return bytes_of(LocalDenoiser(tiny_model()).denoise(map(tile_batch, range(BATCHES))))


@pytest.fixture
def one(ray_cluster: None) -> Iterator[DenoiserPool]:
    """A pool with one ready replica."""
    with DenoiserPool(tiny_model(), RayConfig(replicas=1)) as pool:
        pool.wait_ready()
        yield pool
        pids = [r.pid for r in pool.replicas]
    assert_gone(pids)


def assert_gone(pids: list[int]) -> None:
    until = time.monotonic() + 250
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < until, f"replicas {pids} are still there"
        time.sleep(0.1)


def signalling(pool: DenoiserPool, at: int, number: signal.Signals) -> Iterator[TileBatch]:
    """Yield the batches; freeze the first replica before the first one and signal it before batch `at`.

    Frozen, it cannot have answered, so a SIGKILL finds it inside a call.
    """
    pid = pool.replicas[0].pid
    os.kill(pid, signal.SIGSTOP)
    for i in range(BATCHES):
        if i == at:
            os.kill(pid, number)
        yield tile_batch(i)


@pytest.fixture(scope="class")
def shared(ray_cluster: None) -> Iterator[DenoiserPool]:
    """A pool with a replica on every CPU."""
    with DenoiserPool(tiny_model(), RayConfig(), watch=HEARD) as pool:
        pool.wait_ready(2)
        yield pool
        pids = [r.pid for r in pool.replicas]
    assert_gone(pids)


class TestPool(DenoiserContract):
    @pytest.fixture
    def denoiser(self, shared: DenoiserPool) -> DenoiseTiles:
        return shared

    def test_two_replicas_give_the_local_bytes(
        self, shared: DenoiserPool, expected: list[tuple[str, bytes, bytes]]
    ) -> None:
        shared.wait_ready(2)
        before = shared.stats
        assert bytes_of(shared.denoise(map(tile_batch, range(BATCHES)))) == expected
        assert shared.stats.batches - before.batches == BATCHES
        assert shared.stats.replicas == shared.wished == 2  # ray.replicas=null: one per CPU
        local = LocalDenoiser(tiny_model())
        assert bytes_of(shared.denoise([tile_batch(0, newton=True)])) == bytes_of(
            local.denoise([tile_batch(0, newton=True)])
        )
        assert bytes_of(shared.decode([decode_batch(0)])) == bytes_of(local.decode([decode_batch(0)]))
        assert len(HEARD.batches) == shared.stats.batches
        assert sum(seconds for _, seconds in HEARD.batches) == pytest.approx(shared.stats.compute_s)
        assert [method for method, _ in HEARD.batches[-2:]] == ["denoise", "decode"]

    def test_a_run_left_early_does_not_disturb_the_next(
        self, shared: DenoiserPool, expected: list[tuple[str, bytes, bytes]]
    ) -> None:
        abandoned = shared.denoise(map(tile_batch, range(BATCHES)))
        next(abandoned)
        abandoned.close()  # type: ignore[attr-defined]
        assert bytes_of(shared.denoise(map(tile_batch, range(BATCHES)))) == expected

    def test_a_replica_killed_inside_a_call_changes_no_byte(
        self, shared: DenoiserPool, expected: list[tuple[str, bytes, bytes]]
    ) -> None:
        shared.wait_ready(2)
        before, pid = shared.stats, shared.replicas[0].pid
        assert bytes_of(shared.denoise(signalling(shared, 1, signal.SIGKILL))) == expected
        after = shared.stats
        assert (after.restarts - before.restarts, after.retries - before.retries) == (1, 1)
        assert HEARD.restarts == after.restarts
        assert pid not in [r.pid for r in shared.replicas]

    def test_a_replica_that_hangs_is_replaced(
        self,
        shared: DenoiserPool,
        expected: list[tuple[str, bytes, bytes]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        shared.wait_ready(2)
        before, pid = shared.stats, shared.replicas[0].pid
        monkeypatch.setattr(shared, "config", replace(shared.config, batch_timeout_s=4))
        assert bytes_of(shared.denoise(signalling(shared, 1, signal.SIGSTOP))) == expected
        assert shared.stats.restarts > before.restarts
        assert pid not in [r.pid for r in shared.replicas]
        assert_gone([pid])


def test_one_replica_gives_the_same_bytes_and_another_may_join(
    one: DenoiserPool, expected: list[tuple[str, bytes, bytes]]
) -> None:
    assert bytes_of(one.denoise(map(tile_batch, range(BATCHES)))) == expected
    one.add_replica()

    def joined() -> Iterator[TileBatch]:
        for i in range(BATCHES):
            if i == 4:
                one.wait_ready(2)
                os.kill(one.replicas[0].pid, signal.SIGSTOP)  # so that only the one that joined can answer
            yield tile_batch(i)

    first = one.replicas[0].pid
    answers = one.denoise(joined())
    found = bytes_of(next(answers) for _ in range(3))
    os.kill(first, signal.SIGCONT)
    assert found + bytes_of(answers) == expected
    one.remove_replica()
    assert len(one.replicas) == 1
    with pytest.raises(ValueError, match="last one"):
        one.remove_replica()
    assert bytes_of(one.denoise(map(tile_batch, range(BATCHES)))) == expected


def test_non_finite_answers_are_evaluated_again_in_float32_and_then_given_up() -> None:
    half = tiny_model(torch.float16)
    overflowing = replace(tile_batch(0), x_t=tile_batch(0).x_t * 1e5)  # beyond float16's 65504
    hopeless = tile_batch(2)
    hopeless.x_t[1] = np.nan
    with DenoiserPool(half, RayConfig(replicas=1)) as pool:
        found = bytes_of(pool.denoise([overflowing, tile_batch(1)]))
        assert (pool.stats.float32_retries, pool.stats.retries, pool.stats.restarts) == (1, 1, 0)
        named = r"joint/7/0/2 \(tiles 4, 5, timestep 501\).*max_attempts=4.*non-finite.*rows \[1\]"
        with pytest.raises(ReplicaLostError, match=named):
            list(pool.denoise([tile_batch(0), hopeless, tile_batch(1)]))
        assert len(list(pool.denoise([tile_batch(0)]))) == 1
    wide = LocalDenoiser(tiny_model(torch.float16).to(torch.float32))
    assert found[:1] == bytes_of(wide.denoise([overflowing]))
    assert found[1:] == bytes_of(LocalDenoiser(half).denoise([tile_batch(1)]))


def test_weights_damaged_on_the_way_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_model(tiny_model())
    name = "unet.conv_in.weight"
    bad = replace(packed, tensors=packed.tensors | {name: replace(packed.tensors[name], crc=0)})
    monkeypatch.setattr(pool_module, "pack_model", lambda model: bad)
    monkeypatch.setattr(pool_module, "START_FAILURES", 1)
    with (
        DenoiserPool(tiny_model(), RayConfig(replicas=1)) as pool,
        pytest.raises(ClusterError, match=f"(?s)1 replicas.*{name} arrived damaged"),
    ):
        list(pool.denoise([tile_batch(0)]))


def test_a_gpu_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(ClusterError, match="2 CPU, 0 GPU"):
        DenoiserPool(tiny_model(), RayConfig(), device="cuda")


def test_no_replica_in_time_is_an_error() -> None:
    with (
        DenoiserPool(tiny_model(), RayConfig(start_timeout_s=0.01)) as pool,
        pytest.raises(ClusterError, match="start_timeout_s=0.01"),
    ):
        list(pool.denoise([tile_batch(0)]))


def test_packing_keeps_every_bit_and_layout() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(dtype)
        other = unpack_model(pack_model(model), "cpu")
        for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride()), name
            assert torch.equal(a, b), name


def test_seconds_per_batch_of_nothing_is_zero() -> None:
    assert PoolStats().seconds_per_batch == 0
