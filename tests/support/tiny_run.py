"""What runs of a tiny random model start from: the model and its SSL vectors on disk, and the flags that name them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.model.colour_map import LinearColour
from engine.model.config import ModelConfig, tiny_config, unet_arguments, vae_arguments
from engine.model.zoomldm import ZoomLDM

GROUPS = {"norm_num_groups": 4}


def narrow_config(**changes: Any) -> ModelConfig:
    """Return tiny_config with networks of 8 channels and no attention in the autoencoder, which decode in a seventh of
    the time. Their form is diffusers' alone: the LDM layout needs groups of 32."""
    unet = unet_arguments((8, 8), attention=(False, True), heads=1, layers=1, context=32)
    vae = vae_arguments((8, 8, 8), layers=1, codes=64) | {"mid_block_add_attention": False}
    return tiny_config(**({"unet": unet | GROUPS, "vae": vae | GROUPS} | changes))


def narrow_model(**changes: Any) -> ZoomLDM:
    """Return the same random narrow model every time; `changes` are narrow_config's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ZoomLDM(narrow_config(**changes))


def store_model(folder: Path, **changes: Any) -> Path:
    """Store a narrow model with a colour map; `changes` are narrow_config's. Returns where."""
    model = narrow_model(**changes)
    model.extras["guidance/linear"] = LinearColour(torch.eye(3).double(), torch.zeros(3).double()).tensors()
    model.save_pretrained(folder / "model")
    return folder / "model"


def store_inputs(folder: Path, rows: int, columns: int) -> dict[str, object]:
    """Store a model, and SSL vectors for rows × columns cells; return the flags for them."""
    cells = np.random.default_rng(0).normal(size=(16, rows, columns))
    np.save(folder / "cells.npy", cells.astype(np.float32))
    # Named, because a child process would choose bfloat16 where the CPU has it, and the test itself does not.
    return {"model.source": store_model(folder), "model.dtype": "float32", "embeddings": folder / "cells.npy"}
