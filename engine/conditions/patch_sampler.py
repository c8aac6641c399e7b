"""Single patches at any magnification of a model, by one of diffusers' samplers.

One patch is one tile: no canvas, no overlap, no guide. It does not know files.
Source: LDM's patch sampler: 50 steps, guidance scale s = 1 + w = 2.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from jaxtyping import Float32
from torch import Tensor

from engine.core.numerics import noise_rows
from engine.core.units import TILE_LATENT_PX
from engine.model.zoomldm import ZoomLDM
from engine.sampling.schedule import TRAIN_STEPS

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}


@dataclass(frozen=True)
class PatchSampler:
    """How patches are drawn."""

    scheduler: str
    """A key of SCHEDULERS."""
    steps: int
    scale: float
    """Guidance scale s; eps = s·eps_cond − (s−1)·eps_null."""
    seed: int
    strength: float = 1.0
    """With pictures to vary: share of the steps that are taken, from the picture noised to the first of them."""

    @property
    def taken(self) -> int:
        """Steps that are taken."""
        return min(max(round(self.steps * self.strength), 1), self.steps)

    @torch.inference_mode()
    def draw(
        self, model: ZoomLDM, cells: list[np.ndarray], magnification: int, first: int = 0,
        pictures: Float32[np.ndarray, "b 3 h w"] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Draw one patch per SSL grid (D, h, w), as `draw_from` does from their summaries."""
        grids = [torch.from_numpy(c).to(model.device) for c in cells]
        return self.draw_from(model, model.summarize(grids, [magnification] * len(cells)), first, pictures)

    @torch.inference_mode()
    def draw_from(
        self, model: ZoomLDM, context: Tensor, first: int = 0, pictures: Float32[np.ndarray, "b 3 h w"] | None = None
    ) -> np.ndarray:
        """Draw one patch per summary (B, T, C): float32 (B, 3, 256, 256), about [−1, 1].

        `first` numbers the patches, so that patch n's starting noise does not depend on how they are batched. Patches
        are variations of `pictures` (B, 3, 256, 256) in [−1, 1], where these are given (SDEdit, Meng et al. 2022).
        """
        scheduler = self._scheduler(model)
        size = (0, TILE_LATENT_PX)
        noise = [noise_rows(self.seed, f"patch/{first + i}", 0, size, TILE_LATENT_PX) for i in range(len(context))]
        x = torch.from_numpy(np.stack(noise)).to(model.device)
        timesteps = scheduler.timesteps
        if pictures is None:
            x = x * float(scheduler.init_noise_sigma)
        else:
            begin = self.steps - self.taken
            timesteps = timesteps[begin:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            clean = model.encode(torch.from_numpy(pictures).to(model.device))
            x = scheduler.add_noise(clean, x, timesteps[:1].repeat(len(x)))
        generator = torch.Generator(model.device).manual_seed(self.seed + first)
        takes_generator = isinstance(scheduler, DDPMScheduler)
        for t in timesteps:
            eps = model.predict_eps(scheduler.scale_model_input(x, t), t, context, self.scale - 1)
            extra = {"generator": generator} if takes_generator else {}
            x = scheduler.step(eps, t, x, **extra).prev_sample
        return model.decode(x).float().cpu().numpy()

    def _scheduler(self, model: ZoomLDM):
        """Return the scheduler on the model's noise schedule."""
        arguments = {
            "num_train_timesteps": TRAIN_STEPS,
            "beta_start": model.config.beta_start,
            "beta_end": model.config.beta_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
        }
        if self.scheduler in ("ddim", "ddpm"):
            arguments["clip_sample"] = False
        if self.scheduler == "ddim":
            arguments |= {"steps_offset": 1, "set_alpha_to_one": False}  # as LDM's DDIM
        scheduler = SCHEDULERS[self.scheduler](**arguments)
        scheduler.set_timesteps(self.steps, device=model.device)
        return scheduler
