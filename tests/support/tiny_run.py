"""What runs of a tiny random model start from: the model and its SSL vectors on disk, and the flags that name them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.model.colour_map import LinearColour
from engine.model.zoomldm import ZoomLDM, tiny_config


def store_model(folder: Path, **changes: Any) -> Path:
    """Store a random model with a colour map; `changes` are tiny_config's. Returns where."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZoomLDM(tiny_config(**changes))
    model.extras["guidance/linear"] = LinearColour(torch.eye(3).double(), torch.zeros(3).double()).tensors()
    model.save_pretrained(folder / "model")
    return folder / "model"


def store_inputs(folder: Path, rows: int, columns: int) -> dict[str, object]:
    """Store a model, and SSL vectors for rows × columns cells; return the flags for them."""
    cells = np.random.default_rng(0).normal(size=(16, rows, columns))
    np.save(folder / "cells.npy", cells.astype(np.float32))
    # Named, because a child process would choose bfloat16 where the CPU has it, and the test itself does not.
    return {"model.source": store_model(folder), "model.dtype": "float32", "embeddings": folder / "cells.npy"}
