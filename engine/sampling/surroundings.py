"""What the sampling of a part of a finished picture sees of the rest; it does not know how that is stored."""

from typing import Protocol

import numpy as np


class Surroundings(Protocol):
    """What the sampling of a part sees of the finished picture it lies in. Rows count from the part's top."""

    @property
    def origin(self) -> tuple[int, int]:
        """Where the part lies in its level, latent px (y, x)."""
        ...

    def old(self, y0: int, y1: int) -> np.ndarray:
        """Return the old latents, float32 (3, y1−y0, w)."""
        ...

    def mix(self, y0: int, predicted: np.ndarray, old: np.ndarray | None = None) -> np.ndarray:
        """Mix rows from y0 on, (3, n, w), with the old ones; None: the old latents."""
        ...
