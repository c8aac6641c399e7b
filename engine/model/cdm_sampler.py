"""Summaries without a reference: drawn by the CDM from noise and a magnification.

Invariant: a summary is a function of the CDM, the seed, the magnification and its number. It does not know files,
latents or pictures. Source: ZoomLDM (CVPR 2025): cosine schedule, x0 predicted, 200 DDIM steps with eta 0, no clipping;
Nichol & Dhariwal 2021 for the respaced steps.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float, Float32
from numpy.typing import NDArray
from torch import Tensor

from engine.core.numerics import noise_array
from engine.model.cdm import CDM, TIMES


def alpha_bars() -> NDArray[np.float64]:
    """Return the 1000 alphas_cumprod of the cosine schedule ("squaredcos_cap_v2": betas at most 0.999)."""
    angles = (np.arange(TIMES + 1) / TIMES + 0.008) / 1.008 * np.pi / 2
    share = np.cos(angles) ** 2
    betas = np.minimum(1 - share[1:] / share[:-1], 0.999)
    return np.cumprod(1.0 - betas, dtype=np.float64)


def respaced_times(steps: int) -> list[int]:
    """Return `steps` times from 0 to 999, evenly spaced and rounded: 0, 111, … 888, 999 for ten.

    Raises: ValueError unless 2 ≤ steps ≤ 1000.
    """
    if not 2 <= steps <= TIMES:
        raise ValueError(f"the steps of a CDM must lie in 2..{TIMES}; got {steps}.")
    return [round(i * (TIMES - 1) / (steps - 1)) for i in range(steps)]


def respaced_scheduler(times: Sequence[int]) -> DDIMScheduler:
    """Return diffusers' DDIM on a schedule of its own that has only these times; its step k is times[k].

    DDIMScheduler over all 1000 times steps from t to t − 1000 // n, whatever time comes next: with ten steps from 999
    to 899, where the network is asked for 888 next. On the respaced schedule step k − 1 follows step k.
    """
    kept = alpha_bars()[list(times)]
    betas = 1 - kept / np.concatenate([[1.0], kept[:-1]])
    scheduler = DDIMScheduler(
        num_train_timesteps=len(betas), trained_betas=betas, prediction_type="sample", clip_sample=False
    )
    scheduler.set_timesteps(len(betas))
    return scheduler


def sample_summaries(
    cdm: CDM,
    magnification: int,
    count: int,
    steps: int = 200,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 1,
) -> Float32[Tensor, "{count} t c"]:
    """Draw `count` summaries: float32 (count, T, C) on the CDM's device, what ZoomLDM.summarize would return.

    `magnification` is the model's index. `first` numbers the summaries, so that number n is the same however many are
    drawn with it: to the last bit with batch_size 1, in the first five digits with more, which is faster on a GPU.
    Raises: ValueError for an unknown magnification, or wrong counts.
    """
    if not 0 <= magnification < cdm.config.magnifications:
        raise ValueError(f"a magnification index must lie in 0…{cdm.config.magnifications - 1}; got {magnification}.")
    if count < 1 or batch_size < 1:
        raise ValueError(f"count and batch_size must be at least 1; got {count} and {batch_size}.")
    times = respaced_times(steps)
    shape = (cdm.config.tokens, cdm.config.channels)
    found = []
    for start in range(first, first + count, batch_size):
        numbers = range(start, min(start + batch_size, first + count))
        noise = np.stack([noise_array(seed, f"summary/{magnification}/{n}", shape) for n in numbers])
        found.append(denoise_summaries(cdm, torch.from_numpy(noise), magnification, times))
    return torch.cat(found)


@torch.no_grad()
def denoise_summaries(
    cdm: CDM, noise: Float[Tensor, "b t c"], magnification: int | Tensor, times: Sequence[int]
) -> Float32[Tensor, "b t c"]:
    """Take noise (B, T, C) through the respaced times, last to first: float32 (B, T, C).

    `magnification` is one index for all, or (B,).
    """
    device = cdm.pos_embed.device
    x = noise.to(device, torch.float32)
    labels = torch.as_tensor(magnification, device=device).expand(len(x))
    scheduler = respaced_scheduler(times)
    for k in scheduler.timesteps:
        t = torch.full((len(x),), times[int(k)], device=device)
        x0 = cdm.predict_x0(x.to(cdm.pos_embed.dtype), t, labels).float()
        x = scheduler.step(x0, int(k), x, return_dict=False)[0]
    return cdm.restored(x, labels)
