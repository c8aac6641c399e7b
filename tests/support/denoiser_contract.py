"""What every DenoiseTiles must do; a subclass gives the fixture `denoiser`. Real networks at tiny size.

Also the denoiser that dies, for tests of resuming.
"""

from collections.abc import Iterable, Iterator
from itertools import repeat

import numpy as np
import pytest
import torch

from engine.model.zoomldm import ZoomLDM
from engine.sampling.back_projection import GuideWindows
from engine.sampling.denoiser import (
    DecodeBatch,
    DecodedBatch,
    DenoiseTiles,
    EncodeBatch,
    EncodedBatch,
    NewtonTarget,
    TileBatch,
    TilePrediction,
)
from engine.sampling.guidance import GuidePicture
from tests.support.tiny_run import narrow_config

READ_AHEAD = 16
"""Batches any denoiser of these tests may take before it has answered the first."""


class Dying:
    """A denoiser whose machine dies at a given batch."""

    def __init__(self, inner: DenoiseTiles, batches: int) -> None:
        self.inner, self.left = inner, batches

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        for answer in self.inner.denoise(batches):
            if self.left == 0:
                raise ConnectionError("the machine died")
            self.left -= 1
            yield answer

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        return self.inner.decode(batches)

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        return self.inner.encode(batches)


def tiny_model(dtype: torch.dtype = torch.float32) -> ZoomLDM:
    """Return the same tiny model every time."""
    torch.manual_seed(0)
    return ZoomLDM(narrow_config()).to(dtype).channels_last()


def tile_batch(index: int, magnification: int = 0, newton: bool = False) -> TileBatch:
    """Return batch number `index`: two tiles, the second one padding when the index is odd."""
    draw = np.random.default_rng(index)
    target = draw.uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
    return TileBatch(
        key=f"joint/7/0/{index}",
        tiles=(2 * index, 2 * index + 1) if index % 2 == 0 else (2 * index,),
        x_t=draw.standard_normal((2, 3, 64, 64), dtype=np.float32),
        timestep=501,
        alpha_bar=0.3,
        cells=draw.standard_normal((2, 16, 2, 2), dtype=np.float32),
        magnification=magnification,
        weight=0.0,
        newton=NewtonTarget(target, corrections=1, step=0.005, lr=0.5) if newton else None,
    )


def decode_batch(index: int) -> DecodeBatch:
    return DecodeBatch(f"decode/{index}", (index,), tile_batch(index).x_t[:1])


def encode_batch(index: int) -> EncodeBatch:
    draw = np.random.default_rng(index)
    guide = GuidePicture(draw.uniform(-1, 1, (3, 64, 96)).astype(np.float32), ratio=4)
    return EncodeBatch(f"encode/{index}", (index,), GuideWindows.of(guide, [(0, 0), (0, 32)]))


class Counting:
    """An iterator that knows how many batches were taken."""

    def __init__(self, count: int) -> None:
        self.taken = 0
        self._batches = iter(tile_batch(i) for i in range(count))

    def __iter__(self) -> Iterator[TileBatch]:
        return self

    def __next__(self) -> TileBatch:
        batch = next(self._batches)
        self.taken += 1
        return batch


def bytes_of(answers: Iterable[TilePrediction | DecodedBatch]) -> list[tuple[str, bytes, bytes]]:
    """Return what must be equal between two denoisers: keys and bytes, in order."""
    found = []
    for answer in answers:
        first = answer.images if isinstance(answer, DecodedBatch) else answer.x0
        second = None if isinstance(answer, DecodedBatch) else answer.eps
        assert first.dtype == np.float32
        assert first.flags.writeable
        found.append((answer.key, first.tobytes(), b"" if second is None else second.tobytes()))
    return found


class DenoiserContract:
    """Tests over the fixture `denoiser`."""

    @pytest.fixture
    def denoiser(self) -> DenoiseTiles:
        raise NotImplementedError

    def test_nothing_in_nothing_out(self, denoiser: DenoiseTiles) -> None:
        assert list(denoiser.denoise([])) == []
        assert list(denoiser.decode(iter([]))) == []

    def test_answers_come_in_order(self, denoiser: DenoiseTiles) -> None:
        wanted = [tile_batch(i).key for i in range(6)]
        assert [p.key for p in denoiser.denoise(tile_batch(i) for i in range(6))] == wanted

    def test_reads_ahead_within_bounds(self, denoiser: DenoiseTiles) -> None:
        source = Counting(3 * READ_AHEAD)
        answers = denoiser.denoise(source)
        assert source.taken == 0
        next(answers)
        assert 1 <= source.taken <= READ_AHEAD

    def test_a_source_may_wait_for_an_answer(self, denoiser: DenoiseTiles) -> None:
        taken: list[str] = []

        def source() -> Iterator[TileBatch | None]:
            for i in range(3):
                while len(taken) < i:
                    yield None
                yield tile_batch(i)

        for answer in denoiser.denoise(source()):
            taken += [answer.key]
        assert taken == [tile_batch(i).key for i in range(3)]

    def test_a_source_that_waits_for_nothing_is_an_error(self, denoiser: DenoiseTiles) -> None:
        with pytest.raises(RuntimeError, match="every answer was taken; got None"):
            list(denoiser.denoise(repeat(None)))

    def test_is_pure(self, denoiser: DenoiseTiles) -> None:
        once = bytes_of(denoiser.denoise([tile_batch(0)]))
        again = bytes_of(denoiser.denoise([tile_batch(1), tile_batch(0), tile_batch(0)]))
        assert again[1:] == once * 2

    def test_a_row_does_not_see_its_neighbours(self, denoiser: DenoiseTiles) -> None:
        padded, full = tile_batch(1), tile_batch(1)
        padded.x_t[1], padded.cells[1] = padded.x_t[0], padded.cells[0]
        a, b = denoiser.denoise([padded, full])
        assert a.x0[0].tobytes() == b.x0[0].tobytes()
        assert a.x0[1].tobytes() != b.x0[1].tobytes()

    def test_the_batch_is_left_as_it_was(self, denoiser: DenoiseTiles) -> None:
        batch = tile_batch(2, newton=True)
        list(denoiser.denoise([batch]))
        assert batch.x_t.tobytes() == tile_batch(2).x_t.tobytes()

    def test_newton_answers_with_eps(self, denoiser: DenoiseTiles) -> None:
        plain, moved = denoiser.denoise([tile_batch(3), tile_batch(3, newton=True)])
        assert plain.eps is None
        assert moved.eps is not None
        assert moved.eps.shape == moved.x0.shape == (2, 3, 64, 64)
        assert moved.x0.tobytes() != plain.x0.tobytes()

    def test_decodes_in_order(self, denoiser: DenoiseTiles) -> None:
        pictures = list(denoiser.decode(decode_batch(i) for i in range(3)))
        assert [p.key for p in pictures] == [f"decode/{i}" for i in range(3)]
        assert {p.images.shape for p in pictures} == {(1, 3, 256, 256)}

    def test_encodes_in_order(self, denoiser: DenoiseTiles) -> None:
        latents = list(denoiser.encode(encode_batch(i) for i in range(3)))
        assert [p.key for p in latents] == [f"encode/{i}" for i in range(3)]
        assert {p.latents.shape for p in latents} == {(2, 3, 64, 64)}
        assert latents[0].latents.dtype == np.float32
        (again,) = denoiser.encode([encode_batch(0)])
        assert again.latents.tobytes() == latents[0].latents.tobytes()

    def test_runs_nest(self, denoiser: DenoiseTiles) -> None:
        """The guide of a batch may come from the same denoiser, asked while it waits for that batch."""

        def guided() -> Iterator[TileBatch]:
            for i in range(3):
                (picture,) = denoiser.decode([decode_batch(i)])
                assert picture.key == f"decode/{i}"
                yield tile_batch(i)

        assert bytes_of(denoiser.denoise(guided())) == bytes_of(denoiser.denoise(map(tile_batch, range(3))))

    def test_wrong_batch_is_refused_with_the_models_own_words(self, denoiser: DenoiseTiles) -> None:
        with pytest.raises(ValueError, match="magnification"):
            list(denoiser.denoise([tile_batch(0, magnification=99)]))
        assert len(list(denoiser.denoise([tile_batch(0)]))) == 1
