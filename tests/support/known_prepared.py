"""A small prepared set with known content, for tests of what reads it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.datasets.schema import SetFacts, SlideFacts
from engine.datasets.writer import PatchPlan, PreparedWriter, open_set

FACTS = SetFacts(
    domain="brca",
    magnifications=("20x", "10x", "5x"),
    base_mpp=0.5,
    encoder="demo",
    encoder_digest="e" * 64,
    ssl_dim=16,
    autoencoder_digest="a" * 64,
)


def write_slide(
    folder: Path, shared: SetFacts, slide: str, places: Mapping[str, list[tuple[int, int]]],
    cells: tuple[int, int] = (4, 4), images: bool = False,
) -> SlideFacts:  # fmt: skip
    """Write a slide whose vectors are 100 y + x plus noise and whose latents are random; seeded by its name."""
    rng = np.random.default_rng(list(slide.encode()))
    facts = SlideFacts(slide, f"{slide}.tif", (cells[1] * 256, cells[0] * 256), (0.5, 0.5), "test", "s" * 64, cells, {},
                       images=images)  # fmt: skip
    at = {name: np.array(found, np.int32).reshape(-1, 2) for name, found in places.items()}
    plan = PatchPlan(np.ones(cells, np.bool_), at, {n: np.ones(len(p), np.float32) for n, p in at.items()})
    writer = PreparedWriter(folder, shared, facts, plan)
    where = np.argwhere(plan.needed)
    vectors = where @ [100, 1] + rng.standard_normal((shared.ssl_dim, len(where)))
    writer.write(0, cells=(where, vectors.T))
    for block, (name, found) in enumerate(at.items(), 1):
        arrays = {"latents": rng.standard_normal((len(found), *shared.latent_shape))}
        if images:
            arrays["images"] = rng.integers(0, 256, (len(found), 256, 256, 3), np.uint8)
        writer.write(block, patches=(name, 0, arrays))
    return writer.finish()


def write_set(folder: Path, shared: SetFacts = FACTS, slides: int = 2, images: bool = False) -> Path:
    """Write a set of equal slides of 4 × 4 cells: 16, 4 and 1 patches at three magnifications."""
    open_set(folder, shared)
    places = {
        name: [(y, x) for y in range(0, 5 - k, k) for x in range(0, 5 - k, k)]
        for name in shared.magnifications
        if (k := shared.scale.factor(name)) <= 4
    }
    for number in range(slides):
        write_slide(folder, shared, f"slide{number}", places, images=images)
    return folder
