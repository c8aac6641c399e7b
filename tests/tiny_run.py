"""What runs of a tiny random model start from: the model and its SSL vectors on disk, and the flags that name them."""

from pathlib import Path

import numpy as np
import torch

from engine.model.colour import LinearColour
from engine.model.zoomldm import ZoomLDM, tiny_config


def store_inputs(folder: Path, rows: int, columns: int) -> dict[str, object]:
    """Store a model with a colour map, and SSL vectors for rows × columns cells; return the flags for them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZoomLDM(tiny_config())
    model.extras["guidance/linear"] = LinearColour(torch.eye(3).double(), torch.zeros(3).double()).tensors()
    model.save_pretrained(folder / "model")
    cells = np.random.default_rng(0).normal(size=(16, rows, columns))
    np.save(folder / "cells.npy", cells.astype(np.float32))
    return {"model.source": folder / "model", "embeddings": folder / "cells.npy"}
