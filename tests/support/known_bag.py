"""A small bag whose numbers are known: 5x tiles in a row, each with its 16 children, and features that count."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.features.bag_reader import BagAttributes, BagPlan, BagScale

ATTRIBUTES = BagAttributes(
    slide="S-01",
    mpp_x=0.25,
    mpp_y=0.25,
    mpp_source="openslide",
    level0_width=40_000,
    level0_height=30_000,
    reader="openslide 4.0.1",
    encoder="zoomldm",
    weights_sha256="ab" * 32,
    code_version="0.1.0",
    synthetic=True,
    seed=7,
    objective=40.0,
    block="up.1",
    timestep=100,
    condition="null",
)


def known_plan(parents: int = 3, width: int = 4, dtype: str = "float32", **changes: object) -> BagPlan:
    """Return the plan of `parents` 5x tiles side by side on a slide scanned at 40x."""
    coarse = np.array([[2048 * i, 4096] for i in range(parents)], np.int64).reshape(-1, 2)
    child = np.array([[512 * (i % 4), 512 * (i // 4)] for i in range(16)], np.int64)
    fine = (coarse[:, None] + child).reshape(-1, 2)
    parent = np.repeat(np.arange(parents), 16).astype(np.int64)
    scales = (
        BagScale("20x", 0.5, (512.0, 512.0), fine, parent),
        BagScale("5x", 2.0, (2048.0, 2048.0), coarse),
    )
    return BagPlan(replace(ATTRIBUTES, **changes), scales, width, dtype)  # type: ignore[arg-type]


def known_features(plan: BagPlan) -> dict[str, NDArray[np.float32]]:
    """Return features that say their row and column: 10·row + column, negative at the coarser scale."""
    out = {}
    for sign, scale in zip((1, -1), plan.scales, strict=True):
        rows, columns = np.arange(len(scale.coords))[:, None], np.arange(plan.width)[None]
        out[scale.name] = (sign * (10 * rows + columns)).astype(np.float32)
    return out
