"""Settings of condition inversion, as a section of a run's configuration."""

from dataclasses import dataclass
from typing import Literal

START, END = 950, 50
"""First and last timestep (published)."""


@dataclass(frozen=True)
class InversionConfig:
    """Condition inversion: the SSL grid under a picture of low magnification, found by Adam through the denoiser."""

    steps: int = 200
    """Steps of Adam, at timesteps from 950 down to 50."""
    lr: float = 0.1
    """Its step size; SSL vectors start with a deviation of 1."""
    variety: float = 0.05
    """Weight of the mean cosine between a window's cells, which is pushed down."""
    overlap: float = 0.5
    """Share of a window that the next one sees too, 0..0.9; matters to pictures larger than one tile."""
    start: Literal["noise", "enlarged"] = "noise"
    """Where the vectors begin: noise, as published, or what the model's encoder says of the enlarged picture."""
    batch_size: int = 4
    """Windows evaluated together; changes the last bits."""

    def __post_init__(self) -> None:
        for name, low in (("steps", 2), ("batch_size", 1), ("variety", 0), ("overlap", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"inversion.{name} must be at least {low}; got {getattr(self, name)}.")
        if not self.lr > 0:
            raise ValueError(f"inversion.lr must be positive; got {self.lr}.")
        if self.overlap > 0.9:
            raise ValueError(f"inversion.overlap must be at most 0.9; got {self.overlap}.")

    @property
    def timesteps(self) -> list[int]:
        """Return the timestep of each step, evenly spaced."""
        return [round(START - i * (START - END) / (self.steps - 1)) for i in range(self.steps)]
