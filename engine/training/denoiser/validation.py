"""What a denoiser makes of patches it never saw: its error, and samples of their conditions.

It does not know training. Sampling is the plain tile sampler: no overlap, no guidance between magnifications.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.core.units import LATENT_CHANNELS, TILE_LATENT_PX
from engine.model.zoomldm import ZoomLDM
from engine.sampling.schedule import steps
from engine.training.batches import TIMES, DenoiserPart, PatchSource, Sample, read_part
from engine.training.checkpoints import write_atomically
from engine.training.denoiser.loss import noise_shares, noisy_latents
from engine.training.denoiser.settings import HeldoutSettings
from engine.training.optimisation import step_rng
from engine.training.pictures import as_pictures

_CHOICE, _NOISE = 103, 200
"""Stage numbers: they keep the random streams apart."""
_GUIDANCE = 1.0


def chosen_patches(source: PatchSource, level: int, most: int) -> list[Sample]:
    """Return at most `most` patches of a magnification, always the same, at times spread evenly over 0..999."""
    there = source.count(level)
    count = min(most, there)
    indexes = step_rng(0, _CHOICE, level).choice(there, count, replace=False)
    times = (np.arange(count) + 0.5) * TIMES / max(count, 1)
    return [Sample(level, int(i), int(t), False, n) for n, (i, t) in enumerate(zip(indexes, times, strict=True))]


def _read(source: PatchSource, model: ZoomLDM, samples: list[Sample]) -> DenoiserPart:
    return read_part(source, samples, (0, samples[0].level), model.conditioner.prepare)


def _context(model: ZoomLDM, part: DenoiserPart) -> Tensor:
    return model.conditioner([cell.to(model.device) for cell in part.cells], part.levels)


@torch.no_grad()
def eps_errors(model: ZoomLDM, source: PatchSource, patches: int) -> dict[str, float]:
    """Return the mean squared error of the predicted noise per magnification; one without patches is left out."""
    figures = {}
    for level, name in enumerate(source.names):
        if not (samples := chosen_patches(source, level, patches)):
            continue
        part = _read(source, model, samples)
        x0, noise, times = (v.to(model.device) for v in (part.x0, part.noise, part.times))
        x_t = noisy_latents(noise_shares(model.alphas_cumprod.to(x0.device), times), x0, noise)
        eps = model.predict_eps(x_t, times, _context(model, part), 0.0)
        figures[name] = round(float((eps.float() - noise).square().mean()), 5)
    return figures


@torch.no_grad()
def sample_tiles(model: ZoomLDM, context: Tensor, seed: int, weight: float, stride: int) -> Tensor:
    """Return latents (B, 3, 64, 64) sampled for conditions (B, T, C), `stride` timesteps apart."""
    rng = step_rng(seed, _NOISE, 0)
    shape = (len(context), LATENT_CHANNELS, TILE_LATENT_PX, TILE_LATENT_PX)
    x_t = rng.standard_normal(shape, dtype=np.float32)
    for step in steps(TIMES, stride):
        sample = torch.from_numpy(x_t).to(context.device)
        eps = model.predict_eps(sample, step.t, context, weight)
        x0 = model.x0_from_eps(sample, eps, step.alpha_bar)
        noise = rng.standard_normal(shape, dtype=np.float32)
        x_t = step.update(x0.float().cpu().numpy(), eps.float().cpu().numpy(), noise)
    return torch.from_numpy(x_t).to(context.device)


@torch.no_grad()
def save_samples(path: Path, model: ZoomLDM, source: PatchSource, settings: HeldoutSettings) -> None:
    """Write one row per magnification: held-out patches (odd columns), each with a sample of its condition.

    What is shown as the reference went through the autoencoder, so that the pair differs by the denoiser only.
    """
    rows = []
    for level in range(len(source.names)):
        if not (samples := chosen_patches(source, level, settings.samples)):
            continue
        part = _read(source, model, samples)
        made = sample_tiles(model, _context(model, part), seed=level, weight=_GUIDANCE, stride=settings.stride)
        shown = as_pictures(model.decode(torch.cat([part.x0.to(made), made])))
        count = len(samples)
        rows.append(np.concatenate([shown[at] for i in range(count) for at in (i, count + i)], axis=1))
    width = max(row.shape[1] for row in rows)
    sheet = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
    write_atomically(path, lambda partial: Image.fromarray(sheet).save(partial, format="PNG"))
