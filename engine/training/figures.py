"""Pictures to judge a model by: held-out references beside samples of the same conditions.

It does not know training. Sampling is the plain tile sampler: no overlap, no guidance between magnifications.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.model.zoomldm import ZoomLDM
from engine.schedule import steps
from engine.training.checkpointing import write_atomically
from engine.training.data import as_images, as_pictures
from engine.training.denoiser import LatentTiles
from engine.training.loop import step_rng

_SAMPLES, _GUIDANCE = 4, 1.0


@torch.no_grad()
def sample_tiles(
    model: ZoomLDM, grids: list[Tensor], magnifications: list[int], seed: int, weight: float, stride: int
) -> Tensor:
    """Return latents (B, 3, 64, 64) sampled for the conditions, `stride` timesteps apart."""
    rng = step_rng(seed, 200, 0)
    shape = (len(grids), 3, 64, 64)
    context = model.summarize(grids, magnifications)
    x_t = rng.standard_normal(shape, dtype=np.float32)
    for step in steps(1000, stride):
        sample = torch.from_numpy(x_t).to(context.device)
        eps = model.predict_eps(sample, step.t, context, weight)
        x0 = model.x0_from_eps(sample, eps, step.alpha_bar)
        noise = rng.standard_normal(shape, dtype=np.float32)
        x_t = step.update(x0.float().cpu().numpy(), eps.float().cpu().numpy(), noise)
    return torch.from_numpy(x_t).to(context.device)


@torch.no_grad()
def save_samples(path: Path, model: ZoomLDM, heldout: LatentTiles, stride: int, bfloat16: bool) -> None:
    """Write one row per magnification: four held-out tiles (odd columns), each with a sample of its condition.

    What is shown as the reference went through the autoencoder, so that the pair differs by the denoiser only.
    """
    rows = []
    for level in range(len(heldout.tiles)):
        count = min(_SAMPLES, len(heldout.tiles[level]))
        grids = [torch.from_numpy(np.ascontiguousarray(heldout.pick(level, i)[1])) for i in range(count)]
        real = torch.from_numpy(np.stack([heldout.pick(level, i)[0] for i in range(count)])).float()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            made = sample_tiles(model, grids, [level] * count, seed=level, weight=_GUIDANCE, stride=stride)
            pictures = as_pictures(model.decode(torch.cat([real.to(made), made])))
        pairs = [np.concatenate([pictures[i], pictures[count + i]], axis=1) for i in range(count)]
        rows.append(np.concatenate(pairs, axis=1))
    width = max(row.shape[1] for row in rows)
    sheet = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
    write_atomically(path, lambda partial: Image.fromarray(sheet).save(partial, format="PNG"))


@torch.no_grad()
def save_reconstructions(path: Path, model: ZoomLDM, pictures: list[np.ndarray]) -> None:
    """Write pictures uint8 (256, 256, 3) above what the autoencoder makes of them."""
    made = as_pictures(model.decode(model.encode(as_images(pictures).to(model.device))))
    sheet = np.concatenate([np.concatenate(pictures, axis=1), np.concatenate(list(made), axis=1)])
    write_atomically(path, lambda partial: Image.fromarray(sheet).save(partial, format="PNG"))
