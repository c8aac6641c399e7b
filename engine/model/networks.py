"""The three networks of a model, built from its config alone; on the meta device they cost no memory.

It does not know weights or files. diffusers supplies U-Net and autoencoder; the conditioner is ours.
Source: ZoomLDM (CVPR 2025); the arguments are explained in config.py.
"""

from typing import NamedTuple, cast

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from engine.model.config import ModelConfig
from engine.model.summarizer import Conditioner, build_conditioner


class Networks(NamedTuple):
    """U-Net (3, 64, 64) → eps, VQ autoencoder (3, 256, 256) ↔ (3, 64, 64), conditioner → (T, C)."""

    unet: UNet2DConditionModel
    vae: VQModel
    conditioner: Conditioner

    def named(self) -> dict[str, nn.Module]:
        """Return the networks under the names of their subfolders."""
        return {"unet": self.unet, "vae": self.vae, "conditioner": self.conditioner}


def build_networks(config: ModelConfig, device: torch.device | str = "cpu") -> Networks:
    """Build the networks with random weights in float32, in evaluation mode."""
    with torch.device(device):
        unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(config.unet))
        vae = cast(VQModel, VQModel.from_config(config.vae))
        conditioner = build_conditioner(config)
    return Networks(unet.eval(), vae.eval(), conditioner.eval())
