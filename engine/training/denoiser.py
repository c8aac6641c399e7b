"""The denoiser's batches and its loss: U-Net and Summarizer learn to denoise cached latents.

Invariant: a batch is a pure function of (seed, step). It does not know pixels. Network time argument and index into
alphas_cumprod are the same number 0..999, LDM's training convention.
Source: ZoomLDM (CVPR 2025).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.zoomldm import ZoomLDM
from engine.training.autoencoder import encode_tiles
from engine.training.checkpointing import save_array
from engine.training.data import Regions, Tile
from engine.training.loop import step_rng
from engine.training.places import AttentionWatch, look_up_loss
from engine.training.settings import DenoiserSettings, PlaceSettings

DENOISER = 3
_COARSE_LATENT_PX = (8, 64)


class LatentTiles:
    """Latents and SSL grids of one split, per magnification index."""

    def __init__(self, regions: Regions, latents: list[np.ndarray], tiles: list[list[Tile]]) -> None:
        self.regions, self.latents, self.tiles = regions, latents, tiles

    def pick(self, level: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one tile's latents float16 (3, 64, 64) and its SSL grid float32 (D, k, k)."""
        return self.latents[level][index], self.regions.ssl(self.tiles[level][index], level)


@dataclass(frozen=True)
class Batch:
    """What one step trains on: clean latents, grids, indexes, times, noise and which conditions are dropped."""

    x0: Tensor
    noise: Tensor
    times: Tensor
    grids: list[Tensor]
    magnifications: list[int]
    dropped: Tensor

    def share(self, number: int, count: int) -> "Batch":
        """Return every count-th sample from `number` on."""
        x0, noise, times, dropped = (v[number::count] for v in (self.x0, self.noise, self.times, self.dropped))
        return Batch(x0, noise, times, self.grids[number::count], self.magnifications[number::count], dropped)


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


def wanted_output(prediction_type: str, shares: tuple[Tensor, Tensor], x0: Tensor, noise: Tensor) -> Tensor:
    """Return what a U-Net of this prediction type should say: eps, or v = √ᾱ·eps − √(1−ᾱ)·x0 (Salimans & Ho 2022).

    shares: √ᾱ and √(1−ᾱ), each `(B, 1, 1, 1)`.
    """
    a, b = shares
    return noise if prediction_type == "epsilon" else a * noise - b * x0


def squared_errors(error: Tensor, coarse_weights: tuple[float, ...]) -> Tensor:
    """Return each sample's mean squared error `(B,)` plus the weighted ones of its means over 8×8 and 64×64 squares."""
    total = error.square().mean(dim=(1, 2, 3))
    for side, share in zip(_COARSE_LATENT_PX, coarse_weights, strict=True):
        if share:
            total = total + share * F.avg_pool2d(error, side).square().mean(dim=(1, 2, 3))
    return total


def cache_latents(
    model: ZoomLDM, regions: Regions, tiles: list[list[Tile]], folder: Path, device: str, bfloat16: bool
) -> LatentTiles:
    """Encode tiles magnification by magnification; what exists on disk is read instead."""
    latents = []
    for level, name in enumerate(regions.scale.names):
        path = folder / f"{name}.npy"
        if not path.exists():
            save_array(path, encode_tiles(model.vae, regions, level, tiles[level], device, bfloat16))
        latents.append(np.load(path))
    return LatentTiles(regions, latents, tiles)


def draw_batch(data: LatentTiles, settings: DenoiserSettings, seed: int, step: int, device: str) -> Batch:
    """Draw the batch of a step.

    Times are stratified (one per 1000/B wide stratum, shuffled): the loss depends on the time more than on anything
    else, so this removes most of its noise at no cost.
    """
    rng, size = step_rng(seed, DENOISER, step), settings.batch_size
    shares = np.array(settings.magnification_weights)
    levels = rng.choice(len(shares), size=size, p=shares / shares.sum())
    picked = [data.pick(int(level), int(rng.integers(len(data.tiles[level])))) for level in levels]
    strata = (rng.permutation(size) + rng.random(size)) / size
    noise = rng.standard_normal((size, 3, 64, 64), dtype=np.float32)
    return Batch(
        x0=torch.from_numpy(np.stack([z for z, _ in picked])).float().to(device),
        noise=torch.from_numpy(noise).to(device),
        times=torch.from_numpy((strata * 1000).astype(np.int64)).to(device),
        grids=[torch.from_numpy(np.ascontiguousarray(grid)).to(device) for _, grid in picked],
        magnifications=[int(level) for level in levels],
        dropped=torch.from_numpy(rng.random(size) < settings.drop_condition).to(device),
    )


def noise_shares(model: ZoomLDM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return √ᾱ and √(1−ᾱ) of a batch's times, each `(B, 1, 1, 1)`."""
    alpha_bar = model.alphas_cumprod.to(batch.x0.device, torch.float32)[batch.times]
    return alpha_bar.sqrt()[:, None, None, None], (1 - alpha_bar).sqrt()[:, None, None, None]


def noisy_latents(model: ZoomLDM, batch: Batch) -> Tensor:
    """Return x_t `(B, 3, 64, 64)`, channels last."""
    a, b = noise_shares(model, batch)
    return (a * batch.x0 + b * batch.noise).contiguous(memory_format=torch.channels_last)


def look_up_share(settings: PlaceSettings, step: int) -> float:
    """Return the weight of the look-up loss at a step."""
    return settings.look_up_weight * max(0.0, 1 - step / max(1, settings.look_up_steps))


def guided_loss(
    model: ZoomLDM, batch: Batch, settings: DenoiserSettings, bfloat16: bool, watch: AttentionWatch, weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Return denoiser_loss plus `weight` times the look-up loss of the same forward pass."""
    if weight == 0:
        return denoiser_loss(model, batch, settings, bfloat16)
    with watch.listening() as heard:
        loss, figures = denoiser_loss(model, batch, settings, bfloat16)
    look_up = look_up_loss(heard, batch.grids, batch.dropped)
    return loss + weight * look_up, figures | {"look_up": float(look_up.detach())}


def denoiser_loss(
    model: ZoomLDM, batch: Batch, settings: DenoiserSettings, bfloat16: bool
) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted loss (scalar) and the plain eps error.

    The network predicts v. Predicting eps as the published models do, 28 000 samples taught it to denoise and to
    ignore its condition (measured here): at late times, where a condition decides the layout, x0 is less than a
    percent of eps. Errors averaged over 8×8 and 64×64 latent px count extra: plain MSE
    gives a tile's mean colour 1/4096 of the weight. The minimiser, the conditional mean, stays what it is.
    """
    a, b = noise_shares(model, batch)
    x_t = noisy_latents(model, batch)
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bfloat16):
        cells = [model.conditioner.prepare(grid) for grid in batch.grids]
        v = DenoiserNetworks(model)(x_t, batch.times, cells, batch.magnifications, batch.dropped)
    error = v.float() - wanted_output("v_prediction", (a, b), batch.x0, batch.noise)
    total = squared_errors(error, settings.coarse_weights)
    return total.mean(), {"eps_mse": float((a * error).detach().square().mean())}


@torch.no_grad()
def heldout_eps_error(model: ZoomLDM, data: LatentTiles, device: str, bfloat16: bool) -> dict[str, float]:
    """Return the plain eps error per magnification on every held-out tile, at fixed times and noise."""
    figures = {}
    for level, name in enumerate(data.regions.scale.names):
        count = len(data.tiles[level])
        rng = step_rng(0, DENOISER + 100, level)
        picked = [data.pick(level, i) for i in range(count)]
        batch = Batch(
            x0=torch.from_numpy(np.stack([z for z, _ in picked])).float().to(device),
            noise=torch.from_numpy(rng.standard_normal((count, 3, 64, 64), dtype=np.float32)).to(device),
            times=torch.from_numpy(((np.arange(count) + 0.5) * 1000 / count).astype(np.int64)).to(device),
            grids=[torch.from_numpy(np.ascontiguousarray(grid)).to(device) for _, grid in picked],
            magnifications=[level] * count,
            dropped=torch.zeros(count, dtype=torch.bool, device=device),
        )
        plain = DenoiserSettings(coarse_weights=(0.0, 0.0))
        figures[name] = round(denoiser_loss(model, batch, plain, bfloat16)[1]["eps_mse"], 5)
    return figures
