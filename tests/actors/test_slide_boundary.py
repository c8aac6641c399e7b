"""On Ray Data an exception would end the whole pipeline: each stage turns it into the failure of its slide."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors import slide_pipeline
from actors.slide_pipeline import COLUMN, _Encoder, _plan, _read
from engine.features.blocks import BlockPixels, ExtractTask, TileBlock
from engine.features.tile_encoders import TilePixels
from engine.pipeline.stages import SlideFailure

PATH = Path("a.tif")
ERRORS = [OSError(5, "no"), MemoryError(), RecursionError(), AssertionError(), KeyError("x"), Exception("own")]


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def only(rows: Iterator[Any]) -> SlideFailure:
    (found,) = (pickle.loads(row[COLUMN][0]) for row in rows)
    return found


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_every_stage(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = SimpleNamespace(plan=raising(error), read=raising(error), encode=raising(error))
    stages: Any = SimpleNamespace(encoder=lambda device: bad,
                                  config=SimpleNamespace(model=SimpleNamespace(threads=1)))  # fmt: skip
    monkeypatch.setattr(slide_pipeline, "_worker", lambda stages: bad)
    monkeypatch.setattr(slide_pipeline, "pin_arithmetic", lambda threads: None)
    monkeypatch.setattr(slide_pipeline, "_has_given_up", lambda board, slide: False)
    grid: Any = None
    block = TileBlock("a", PATH, (1, 1), grid, 0, 0)
    tiles = TilePixels("a", "20x", np.zeros((0, 2), np.int64), np.zeros((0, 3, 256, 256), np.uint8))
    pixels = BlockPixels(block, tiles, tiles, None, 0, 0.0)
    encoder = _Encoder(stages, "cpu", None)
    for item, stage in (
        (ExtractTask("a", PATH), lambda rows: _plan(rows, stages)), (block, lambda rows: _read(rows, stages, None)),
        (pixels, encoder),
    ):  # fmt: skip
        failure = only(stage(slide_pipeline._packed(item)))
        assert isinstance(failure, SlideFailure)
        assert (failure.slide, failure.path) == ("a", PATH)
        assert failure.code
        assert type(error).__name__ in failure.message
