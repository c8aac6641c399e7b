"""The networks that are trained together, and the parts of their loss.

It does not know where batches come from. Network time argument and index into alphas_cumprod are the same number
0..999, LDM's training convention. Source: ZoomLDM (CVPR 2025).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.zoomldm import ZoomLDM

_COARSE_LATENT_PX = (8, 64)


class DenoiserNetworks(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, model: ZoomLDM) -> None:
        super().__init__()
        self.unet, self.conditioner = model.unet, model.conditioner

    def forward(
        self, x_t: Tensor, times: Tensor, cells: list[Tensor], magnifications: list[int], dropped: Tensor
    ) -> Tensor:
        """Return what the U-Net says of `(B, 3, 64, 64)`; `cells` are prepared grids, dropped ones count as none."""
        context = self.conditioner(cells, magnifications)
        null = self.conditioner.null(len(cells)).to(context.dtype)
        context = torch.where(dropped[:, None, None], null, context)
        return self.unet(x_t, times, encoder_hidden_states=context, return_dict=False)[0]


def noise_shares(alphas_cumprod: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return √ᾱ and √(1−ᾱ) of timesteps `(B,)`, each `(B, 1, 1, 1)` float32."""
    alpha_bar = alphas_cumprod.to(torch.float32)[times][:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def noisy_latents(shares: tuple[Tensor, Tensor], x0: Tensor, noise: Tensor) -> Tensor:
    """Return x_t `(B, 3, 64, 64)`, channels last."""
    return (shares[0] * x0 + shares[1] * noise).contiguous(memory_format=torch.channels_last)


def wanted_output(prediction_type: str, shares: tuple[Tensor, Tensor], x0: Tensor, noise: Tensor) -> Tensor:
    """Return what a U-Net of this prediction type should say: eps, or v = √ᾱ·eps − √(1−ᾱ)·x0 (Salimans & Ho 2022).

    The published models predict eps. The demo's predicts v: predicting eps, 28 000 samples taught it to denoise and to
    ignore its condition (measured here): at late times, where a condition decides the layout, x0 is less than a
    percent of eps.
    """
    a, b = shares
    return noise if prediction_type == "epsilon" else a * noise - b * x0


def squared_errors(error: Tensor, coarse_weights: tuple[float, ...]) -> Tensor:
    """Return each sample's mean squared error `(B,)` plus the weighted ones of its means over 8×8 and 64×64 squares.

    Plain MSE gives a tile's mean colour 1/4096 of the weight. The minimiser, the conditional mean, stays what it is.
    """
    total = error.square().mean(dim=(1, 2, 3))
    for side, share in zip(_COARSE_LATENT_PX, coarse_weights, strict=True):
        if share:
            total = total + share * F.avg_pool2d(error, side).square().mean(dim=(1, 2, 3))
    return total
