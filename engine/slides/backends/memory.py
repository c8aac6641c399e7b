"""Levels that are arrays of this process: numpy, or dask arrays that are computed window by window.

For what comes from another program: a registered, stain-normalised or stitched slide, without being written. Reads are
safe from several threads. It knows no files.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.core.errors import SlideError
from engine.core.lazy import as_rgb
from engine.slides.backends.base import Window, plausible_levels
from engine.slides.backends.choice import ONLY
from engine.slides.resolution import Claims


class MemoryLevels:
    """Arrays as levels, finest first; picklable as far as the arrays are."""

    reader = "array"
    choice = ONLY

    def __init__(self, name: str, arrays: Sequence[Any]) -> None:
        """Arrays are uint8 (h, w, 3) or (3, h, w), all px valid.

        Raises: EngineError for others; SlideError `unsupported` for levels that are not one picture reduced.
        """
        self.arrays = [as_rgb(array) for array in arrays]
        sizes = [tuple(array.shape[:2]) for array in self.arrays]
        if not sizes or plausible_levels(sizes) != list(range(len(sizes))):
            raise SlideError(
                "unsupported",
                f"{name}: arrays of several levels must be one picture, each smaller than the one before; their sizes "
                f"are {sizes}. Give the finest alone.",
            )
        self.sizes = tuple(sizes)
        self.claims = Claims()

    def window(self, level: int, y: int, x: int, h: int, w: int) -> Window:
        """Return a window that lies inside the level."""
        window = Window.absent(h, w)
        window.paint(0, 0, np.asarray(self.arrays[level][y : y + h, x : x + w]), (h, w))
        return window

    def close(self) -> None:
        """Do nothing: no file is held."""
