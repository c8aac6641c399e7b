"""LocalDenoiser, the specification, under the contract that every denoiser passes (the pool: actors/test_pool.py)."""

import pytest
from denoiser_contract import DenoiserContract, bytes_of, tile_batch, tiny_model

from engine import predict
from engine.predict import DenoiseTiles, LocalDenoiser


class TestLocalDenoiser(DenoiserContract):
    @pytest.fixture
    def denoiser(self) -> DenoiseTiles:
        return LocalDenoiser(tiny_model())


def test_remembered_contexts_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [tile_batch(i) for i in (0, 1, 0, 1)]
    remembered = LocalDenoiser(tiny_model())
    kept = bytes_of(remembered.denoise(batches))
    assert len(remembered._contexts) == 2
    monkeypatch.setattr(predict, "CONTEXTS_KEPT", 1)
    forgetful = LocalDenoiser(tiny_model())
    assert bytes_of(forgetful.denoise(batches)) == kept
    assert len(forgetful._contexts) == 1
