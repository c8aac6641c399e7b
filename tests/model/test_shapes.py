"""The shapes in annotations are checked in tests: an array of another shape or dtype fails where it goes in."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from engine.core.cli import PROJECT_ROOT
from engine.features.tile_encoders import cell_grids
from engine.model.colour_map import LinearColour
from engine.model.zoomldm import ZoomLDM, quantise, tiny_config
from engine.sampling.blend import RowAverager, smooth_weight
from engine.sampling.denoiser import DecodeBatch
from engine.sampling.schedule import steps
from engine.sampling.ssl_grid import tile_cells


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


NONE: Any = None  # never reached
WRONG: dict[str, Callable[[], object]] = {
    "another batch": lambda: ZoomLDM(tiny_config()).predict_eps(torch.zeros(2, 3, 8, 8), 1, torch.zeros(1, 1, 8), 0),
    "no batch": lambda: ZoomLDM(tiny_config()).decode(torch.zeros(3, 8, 8)),
    "codes too narrow": lambda: quantise(torch.zeros(1, 3, 8, 8), torch.zeros(16, 2)),
    "colours of another place": lambda: LinearColour.fit(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)),
    "noise of another size": lambda: steps(500, 100)[0].renoise(zeros(3, 8, 8), zeros(3, 8, 4)),
    "float64 tile": lambda: DecodeBatch("a", (0,), np.zeros((1, 3, 64, 64))),  # type: ignore[arg-type]
    "tile not square": lambda: RowAverager(3, 64, smooth_weight(64)).add(0, 0, zeros(3, 64, 32)),
    "flat grid": lambda: tile_cells(zeros(4, 4), 0, 0, 1),
    "uint8 wanted": lambda: cell_grids(NONE, zeros(1, 4, 4, 3, 256, 256)),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_shape_fails(call: Callable[[], object]) -> None:
    with pytest.raises(TypeCheckError):
        call()


def test_nothing_is_checked_outside_of_tests() -> None:
    script = (
        "import sys, numpy as np; from engine.sampling.denoiser import DecodeBatch;"
        "DecodeBatch('a', (0,), np.zeros(1)); sys.exit('beartype' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, timeout=200).returncode == 0
