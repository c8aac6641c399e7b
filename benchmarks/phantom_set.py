"""A prepared set of phantom tissue for measuring the trainer: demo autoencoder, demo encoder, base patches alone."""

from pathlib import Path

import numpy as np
import torch

from engine.magnification import TILE_PX
from engine.model.demo_encoder import DemoEncoder
from engine.model.ssl_encoder import digest_of
from engine.model.zoomldm import ZoomLDM, autoencoder_digest
from engine.prepared_facts import SetFacts, SlideFacts
from engine.prepared_writer import PatchPlan, PreparedWriter, open_set
from engine.slides.phantom import Phantom
from engine.training.data import as_images


def write_phantom_set(folder: Path, rows: int, columns: int, seed: int = 11) -> np.ndarray:
    """Write a set of one slide of rows × columns cells with a 20x patch on each; return them uint8 (N, 256, 256, 3)."""
    demo = ZoomLDM.from_pretrained("demo")
    encoder = DemoEncoder.from_tensors(demo.extras["encoder/model"])
    phantom, step = Phantom(seed=seed, pleomorphism=0.5, architecture=0.5), TILE_PX * 0.5
    where = np.argwhere(np.ones((rows, columns), np.bool_)).astype(np.int32)
    # Far apart, so that patches differ: neighbours of one tissue look alike.
    pictures = np.stack([phantom.render(y * 8 * step, x * 8 * step, TILE_PX, TILE_PX, 0.5) for y, x in where])
    with torch.no_grad():
        latents = torch.cat(
            [demo.encode(as_images(list(part))) for part in np.array_split(pictures, len(where) // 8 or 1)]
        )
        vectors = encoder.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()
    shared = SetFacts(
        domain="brca", magnifications=demo.config.magnifications, base_mpp=demo.config.base_mpp, encoder="demo",
        encoder_digest=digest_of(encoder.tensors()), ssl_dim=demo.config.ssl_dim,
        autoencoder_digest=autoencoder_digest(demo),
    )  # fmt: skip
    open_set(folder, shared)
    size = (columns * TILE_PX, rows * TILE_PX)
    facts = SlideFacts("phantom", "none", size, (0.5, 0.5), "phantom", "0" * 64, (rows, columns), {}, synthetic=True)
    plan = PatchPlan(np.ones((rows, columns), np.bool_), {"20x": where}, {"20x": np.ones(len(where), np.float32)})
    writer = PreparedWriter(folder, shared, facts, plan)
    writer.write(0, cells=(where, vectors))
    writer.write(1, patches=("20x", 0, {"latents": latents.numpy()}))
    writer.finish()
    return pictures
