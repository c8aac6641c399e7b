"""Prepared sets of phantom tissue for measuring the trainer, by the demo model's autoencoder and encoder."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.conditions.reference import embedding_grid
from engine.core.units import TILE_PX
from engine.datasets.schema import SLIDE, SLIDES, SetFacts, SlideFacts
from engine.datasets.writer import PatchPlan, PreparedWriter, open_set
from engine.model.encoders.base import digest_of
from engine.model.encoders.demo import DemoEncoder
from engine.model.zoomldm import ZoomLDM, autoencoder_digest
from engine.slides.phantom.render import Phantom
from engine.training.demo.data import box_average
from engine.training.pictures import as_images, as_pictures

Pictures = NDArray[np.uint8]
"""(N, 256, 256, 3)."""


class DemoNetworks:
    """The demo model's autoencoder and SSL encoder, and what a set made with them says of itself."""

    def __init__(self) -> None:
        self.model = ZoomLDM.from_pretrained("demo")
        self.encoder = DemoEncoder.from_tensors(self.model.extras["encoder/model"])
        config = self.model.config
        self.facts = SetFacts(
            domain="brca", magnifications=config.magnifications, base_mpp=config.base_mpp, encoder="demo",
            encoder_digest=digest_of(self.encoder.tensors()), ssl_dim=config.ssl_dim,
            autoencoder_digest=autoencoder_digest(self.model),
        )  # fmt: skip

    @torch.no_grad()
    def latents(self, pictures: Pictures) -> NDArray[np.float32]:
        """Return (N, 3, 64, 64)."""
        parts = np.array_split(pictures, len(pictures) // 8 or 1)
        return torch.cat([self.model.encode(as_images(list(part))) for part in parts]).numpy()

    @torch.no_grad()
    def pictures(self, latents: NDArray[np.float32]) -> Pictures:
        """Return what the autoencoder makes of latents (N, 3, 64, 64)."""
        parts = np.array_split(latents, len(latents) // 8 or 1)
        return np.concatenate([as_pictures(self.model.decode(torch.from_numpy(part))) for part in parts])

    @torch.no_grad()
    def vectors(self, pictures: Pictures) -> NDArray[np.float32]:
        """Return (N, D)."""
        return self.encoder.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()


def write_phantom_set(folder: Path, rows: int, columns: int, seed: int = 11) -> Pictures:
    """Write a set of one slide of rows × columns cells with a 20x patch on each; return the patches."""
    networks = DemoNetworks()
    phantom, step = Phantom(seed=seed, pleomorphism=0.5, architecture=0.5), TILE_PX * 0.5
    where = np.argwhere(np.ones((rows, columns), np.bool_)).astype(np.int32)
    # Far apart, so that patches differ: neighbours of one tissue look alike.
    pictures = np.stack([phantom.render(y * 8 * step, x * 8 * step, TILE_PX, TILE_PX, 0.5) for y, x in where])
    writer = _begin(folder, networks, "phantom", (rows, columns), {"20x": where}, images=False)
    writer.write(0, cells=(where, networks.vectors(pictures)))
    writer.write(1, patches=("20x", 0, {"latents": networks.latents(pictures)}))
    writer.finish()
    return pictures


def write_piece(folder: Path, networks: DemoNetworks, seed: int, side: int, counts: Mapping[str, int]) -> None:
    """Add a slide of side × side cells of one phantom, with so many patches of each magnification, unless it is there.

    Patches lie on cells drawn at random, no two on the same; their pixels are kept.
    """
    name = f"phantom_{seed}"
    if (folder / SLIDES / name / SLIDE).exists():
        return
    pixels = Phantom.varied(seed).render(0, 0, side * TILE_PX, side * TILE_PX, networks.facts.base_mpp)
    cells = np.argwhere(np.ones((side, side), np.bool_)).astype(np.int32)
    rng = np.random.default_rng(seed)
    free = {mag: side - networks.facts.scale.factor(mag) + 1 for mag in counts}
    places = {
        mag: np.stack(np.divmod(rng.choice(free[mag] ** 2, count, replace=False), free[mag]), 1).astype(np.int32)
        for mag, count in counts.items()
    }
    writer = _begin(folder, networks, name, (side, side), places, images=True)
    writer.write(0, cells=(cells, embedding_grid(pixels, networks.encoder).reshape(-1, side * side).T))
    for block, (mag, where) in enumerate(places.items(), 1):
        k = networks.facts.scale.factor(mag)
        windows = [pixels[y * TILE_PX : (y + k) * TILE_PX, x * TILE_PX : (x + k) * TILE_PX] for y, x in where]
        images = np.stack([box_average(window, k) for window in windows])
        writer.write(block, patches=(mag, 0, {"latents": networks.latents(images), "images": images}))
    writer.finish()


def _begin(
    folder: Path,
    networks: DemoNetworks,
    name: str,
    cells: tuple[int, int],
    places: dict[str, NDArray[np.int32]],
    images: bool,
) -> PreparedWriter:
    """Open the set and one slide of it, all of whose cells are needed."""
    open_set(folder, networks.facts)
    size = (cells[1] * TILE_PX, cells[0] * TILE_PX)
    facts = SlideFacts(
        name, "none", size, (0.5, 0.5), "phantom", "0" * 64, cells, {}, images=images, synthetic=True
    )  # fmt: skip
    tissue = {mag: np.ones(len(where), np.float32) for mag, where in places.items()}
    return PreparedWriter(folder, networks.facts, facts, PatchPlan(np.ones(cells, np.bool_), places, tissue))
