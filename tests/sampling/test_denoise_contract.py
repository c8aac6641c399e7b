"""LocalDenoiser, the specification, under the contract that every denoiser passes (the pool: actors/test_pool.py)."""

import logging
import resource

import pytest
import torch

from engine.core.errors import DeviceMemoryError
from engine.sampling import denoiser
from engine.sampling.denoiser import DenoiseTiles, LocalDenoiser, is_out_of_memory
from tests.support.denoiser_contract import DenoiserContract, bytes_of, tile_batch, tiny_model


class TestLocalDenoiser(DenoiserContract):
    @pytest.fixture
    def denoiser(self) -> DenoiseTiles:
        return LocalDenoiser(tiny_model())


def test_remembered_contexts_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [tile_batch(i) for i in (0, 1, 0, 1)]
    remembered = LocalDenoiser(tiny_model())
    kept = bytes_of(remembered.denoise(batches))
    assert len(remembered._contexts) == 2
    monkeypatch.setattr(denoiser, "CONTEXTS_KEPT", 1)
    forgetful = LocalDenoiser(tiny_model())
    assert bytes_of(forgetful.denoise(batches)) == kept
    assert len(forgetful._contexts) == 1


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_ran_out_once_changes_no_byte(kind: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    expected = bytes_of(LocalDenoiser(tiny_model()).denoise([tile_batch(0)]))
    starved, left = LocalDenoiser(tiny_model()), [kind("20 GiB are too many")]

    def no_memory(*_: object) -> None:
        if left:
            raise left.pop()

    starved.model.unet.register_forward_pre_hook(no_memory)
    with caplog.at_level(logging.WARNING):
        assert bytes_of(starved.denoise([tile_batch(0)])) == expected
    assert "joint/7/0/0 (20 GiB are too many); it is evaluated once more, whole" in caplog.text
    left += [kind("a"), kind("b")]
    with pytest.raises(DeviceMemoryError, match=r"joint/7/0/1 must fit.*; a\..*sampling\.batch_size"):
        list(starved.denoise([tile_batch(1)]))


def test_only_a_shortage_of_memory_is_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, hard))
    try:
        with pytest.raises(RuntimeError) as error:
            torch.empty(1 << 41, dtype=torch.uint8)  # torch has no type of its own for this on a CPU
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("a wrong shape"))
