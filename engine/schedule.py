"""Timesteps and the one update rule of every sampler here.

It does not know networks or pictures: latents in, latents out, elementwise.
Source: ZoomLDM's joint sampling (abar at t−1, abar_prev at max(t−1−stride, 0)) and the predecessor's last clean step.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRAIN_STEPS = 1000


def betas() -> NDArray[np.float64]:
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

    def update(self, x0: np.ndarray, eps: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Return x_{t−}: sqrt(abar_prev)·x0 + sqrt(1 − abar_prev − beta~)·eps + sqrt(beta~)·noise, in x0's dtype."""
        a = self.alpha_bar_prev**0.5
        b = max(1 - self.alpha_bar_prev - self.beta, 0.0) ** 0.5
        c = self.beta**0.5
        kind = x0.dtype.type
        out = kind(a) * x0  # in place from here on: bands of a large canvas are 50 MB
        out += kind(b) * eps
        out += kind(c) * noise
        return out

    def eps_from_x0(self, x_t: np.ndarray, x0: np.ndarray) -> np.ndarray:
        """Return the noise that x_t and x0 imply."""
        kind = x0.dtype.type
        out = kind(self.alpha_bar**0.5) * x0
        np.subtract(x_t, out, out=out)
        out /= kind((1 - self.alpha_bar) ** 0.5)
        return out

    def renoise(self, x0: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Return x_t of clean latents."""
        kind = x0.dtype.type
        return kind(self.alpha_bar**0.5) * x0 + kind((1 - self.alpha_bar) ** 0.5) * noise


def steps(start: int, stride: int, last_clean: bool = False) -> tuple[Step, ...]:
    """Return the steps start, start − stride, … > 0.

    `last_clean` ends at abar = 1 without noise (the predecessor); otherwise the last step ends at training step 0.
    """
    schedule = betas()
    alpha_bars = np.cumprod(1 - schedule)
    found = []
    for t in range(start, 0, -stride):
        alpha_bar, previous = alpha_bars[t - 1], alpha_bars[max(t - 1 - stride, 0)]
        variance = schedule[t - 1] * (1 - previous) / (1 - alpha_bar)
        if last_clean and t - stride <= 0:
            previous, variance = 1.0, 0.0
        found.append(Step(t, float(alpha_bar), float(previous), float(variance)))
    return tuple(found)
