"""A tiny model in the published layout, made here, and the team's reference activations where they exist."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.weights.ldm_import import to_ldm_state_dict
from engine.model.weights.ldm_names import UNET_PREFIX, ema_name
from engine.model.zoomldm import ConditionerConfig, ZoomLDM, tiny_config


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference activations: $ZOOMLDM_SHARED, or shared/ beside the repository."""
    folder = Path(os.environ.get("ZOOMLDM_SHARED", Path(__file__).parents[3] / "shared"))
    if not (folder / "parity").is_dir():
        pytest.skip(f"no reference activations in {folder}; set ZOOMLDM_SHARED")
    return folder


def brca_config() -> ModelConfig:
    """Tiny, with the eight BRCA magnifications, because the published layout implies them."""
    names = ("20x", "10x", "5x", "2.5x", "1.25x", "0.625x", "0.3125x", "0.15625x")
    heads = ConditionerConfig(output_dim=32, width=32, layers=1, heads=8, mlp=64)
    return tiny_config(magnifications=names, conditioner=heads)


@pytest.fixture
def model() -> ZoomLDM:
    torch.manual_seed(0)
    return ZoomLDM(brca_config())


def published_document(config: ModelConfig) -> dict[str, Any]:
    """The config.yaml that describes `config` in the published layout."""
    unet = {
        "image_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "num_heads": 1,
        "use_spatial_transformer": True,
        "context_dim": 32,
    }
    dd = {
        "double_z": False,
        "z_channels": 3,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    }
    conditioner = {
        "input_channels": config.ssl_dim,
        "hidden_channels": 32,
        "output_channels": 32,
        "num_layers": 1,
        "vit_mlp_dim": 64,
    }
    params = {
        "linear_start": config.beta_start,
        "linear_end": config.beta_end,
        "unet_config": {"params": unet},
        "first_stage_config": {"params": {"embed_dim": 3, "n_embed": 64, "ddconfig": dd}},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.EmbeddingViT2_5", "params": conditioner},
    }
    return {"model": {"params": params}}


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Path]:
    """Write a model in the published layout with changed tensors; return the folder."""

    def write(model: ZoomLDM, change: Callable[[dict[str, Tensor]], Any] = lambda _: None) -> Path:
        tensors = to_ldm_state_dict(model.as_weights())
        unet = {name: value for name, value in tensors.items() if name.startswith(UNET_PREFIX)}
        tensors |= {ema_name(name): value + 1 for name, value in unet.items()}
        tensors |= {"betas": model.betas.float(), "model_ema.decay": torch.tensor(0.9999)}
        tensors |= {"first_stage_model.loss.logvar": torch.zeros(1)}
        folder = tmp_path / "published"
        folder.mkdir()
        torch.save(change(tensors) or tensors, folder / "weights.ckpt")
        (folder / "config.yaml").write_text(yaml.safe_dump(published_document(model.config)))
        return folder

    return write
