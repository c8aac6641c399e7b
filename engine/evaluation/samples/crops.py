"""Which crops of a picture count: 256² px at one µm/px, with enough tissue, at places drawn by a seed.

It does not know files. Source: crops at random places rather than on the grid of tiles, as in Graikos et al. 2024
(crop FID): a grid would lie between the seams and never show one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.core.units import TILE_PX

MOST_CROPS = 5000
"""Crops taken where no number is asked for: more take hours with a large encoder, and change little."""


class Crop(NamedTuple):
    """256² px of one picture."""

    pixels: NDArray[np.uint8]
    """(3, 256, 256)."""
    source: int
    y: int
    """Of its corner, px of the crops' µm/px."""
    x: int


@dataclass(frozen=True)
class CropRule:
    """Which crops are taken."""

    mpp: float
    """µm/px."""
    count: int | None
    """None takes all there are, at most MOST_CROPS."""
    stride: int = TILE_PX
    """px between neighbours; below 256 they overlap and count more than once."""
    min_tissue: float = 0.25
    """Share of a crop's px below `tissue_grey`."""
    tissue_grey: float = 215.0
    seed: int = 0

    def said(self) -> str:
        """Return the rule in words."""
        many = "all" if self.count is None else f"{self.count}, drawn by seed {self.seed},"
        return (
            f"{many} {TILE_PX}² px crops at {self.mpp:g} µm/px, every {self.stride} px from a random corner per "
            f"picture, at least {self.min_tissue:.0%} of px with mean grey < {self.tissue_grey:g}"
        )


def tissue_share(pixels: NDArray[np.uint8], grey: float) -> float:
    """Return the share of px of (3, h, w) whose mean is below `grey`."""
    return float((pixels.astype(np.float32).mean(axis=0) < grey).mean())
