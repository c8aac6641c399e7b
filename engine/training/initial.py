"""Where the denoiser starts from when not from random weights. It does not know training."""

import torch
from torch import nn

from engine.model.zoomldm import ZoomLDM


@torch.no_grad()
def start_from_model(model: ZoomLDM, source: str) -> None:
    """Copy autoencoder, U-Net and Summarizer of another model (a folder or Hub id) of the same sizes into `model`.

    Where the other one predicts another quantity, the output layer starts at zero instead: v = 0 is the right mean.
    Raises: CheckpointError when it cannot be had; RuntimeError naming the keys when sizes differ.
    """
    other = ZoomLDM.from_pretrained(source)
    model.vae.load_state_dict(other.vae.state_dict())
    model.unet.load_state_dict(other.unet.state_dict())
    model.conditioner.load_state_dict(other.conditioner.state_dict())
    if other.config.prediction_type != model.config.prediction_type:
        start_at_zero(model.unet.conv_out)


@torch.no_grad()
def start_at_zero(layer: nn.Conv2d) -> None:
    """Set a layer to zero, as diffusion networks' output layers start."""
    layer.weight.zero_()
    if layer.bias is not None:
        layer.bias.zero_()
