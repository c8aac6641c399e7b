"""Timesteps and the one update rule of every sampler here.

It does not know networks or pictures: latents in, latents out, elementwise.
Source: ZoomLDM's joint sampling (abar at t−1, abar_prev at max(t−1−stride, 0)) and the predecessor's last clean step;
Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), the multistep solver of second order.
"""

from dataclasses import dataclass, replace
from math import log
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64

TRAIN_STEPS = 1000
Solver = Literal["ddim", "dpmpp_2m"]
Latents = Float[np.ndarray, "*shape"]
"""Of any shape, all of one call the same."""


def betas() -> Float64[np.ndarray, "1000"]:
    """Return the 1000 betas: the square of a linspace between square roots ("scaled_linear" in diffusers)."""
    return np.linspace(0.0015**0.5, 0.0195**0.5, TRAIN_STEPS, dtype=np.float64) ** 2


@dataclass(frozen=True)
class Step:
    """One timestep with the constants of its update."""

    t: int
    """The network's time argument."""
    alpha_bar: float
    alpha_bar_prev: float
    beta: float
    """beta~, the variance of the fresh noise; 0 = a deterministic step."""
    trend: float = 0.0
    """Weight of x0's change since the step before; 0 = a step of first order."""

    def update(self, x0: Latents, eps: Latents, noise: Latents | None, before: Latents | None = None) -> Latents:
        """Return x_{t−}, in x0's dtype: sqrt(abar_prev)·x0 + sqrt(1 − abar_prev − beta~)·eps + sqrt(beta~)·noise, and
        trend·(x0 − before), where `before` is x0 of the step before.

        `noise` may be None where beta~ is 0, `before` where trend is.
        """
        a = self.alpha_bar_prev**0.5
        b = max(1 - self.alpha_bar_prev - self.beta, 0.0) ** 0.5
        kind = x0.dtype.type
        out = kind(a + self.trend) * x0  # in place from here on: bands of a large canvas are 50 MB
        out += kind(b) * eps
        if noise is not None:
            out += kind(self.beta**0.5) * noise
        if before is not None:
            out -= kind(self.trend) * before
        return out

    def eps_from_x0(self, x_t: Latents, x0: Latents) -> Latents:
        """Return the noise that x_t and x0 imply."""
        kind = x0.dtype.type
        out = kind(self.alpha_bar**0.5) * x0
        np.subtract(x_t, out, out=out)
        out /= kind((1 - self.alpha_bar) ** 0.5)
        return out

    def renoise(self, x0: Latents, noise: Latents) -> Latents:
        """Return x_t of clean latents."""
        kind = x0.dtype.type
        return kind(self.alpha_bar**0.5) * x0 + kind((1 - self.alpha_bar) ** 0.5) * noise


def steps(start: int, stride: int, last_clean: bool = False, solver: Solver = "ddim") -> tuple[Step, ...]:
    """Return the steps start, start − stride, … > 0.

    `last_clean` ends at abar = 1 without noise (the predecessor); otherwise the last step ends at training step 0.
    `dpmpp_2m` is deterministic and of second order between the first step and the last.
    """
    schedule = betas()
    alpha_bars = np.cumprod(1 - schedule)
    found: list[Step] = []
    for t in range(start, 0, -stride):
        alpha_bar, previous = float(alpha_bars[t - 1]), float(alpha_bars[max(t - 1 - stride, 0)])
        variance = float(schedule[t - 1]) * (1 - previous) / (1 - alpha_bar) if solver == "ddim" else 0.0
        if last_clean and t - stride <= 0:
            previous, variance = 1.0, 0.0
        step = Step(t, alpha_bar, previous, variance)
        if solver == "dpmpp_2m" and found and t - stride > 0:
            step = replace(step, trend=_trend(found[-1], step))
        found.append(step)
    return tuple(found)


def _trend(before: Step, step: Step) -> float:
    """Return (α' − α·σ'/σ)·h/(2·h_before), α = √abar, σ = √(1 − abar), h the step in half the log of α²/σ².

    With eps kept as it was predicted, this is all that the second order adds to a DDIM step.
    """

    def half_snr(alpha_bar: float) -> float:
        return log(alpha_bar / (1 - alpha_bar)) / 2

    h_before = half_snr(before.alpha_bar_prev) - half_snr(before.alpha_bar)
    h = half_snr(step.alpha_bar_prev) - half_snr(step.alpha_bar)
    shrink = ((1 - step.alpha_bar_prev) / (1 - step.alpha_bar)) ** 0.5
    return (step.alpha_bar_prev**0.5 - step.alpha_bar**0.5 * shrink) * h / (2 * h_before)
