"""What the demo's training leaves: the model folder, a condition to ask it for, a picture of its reconstructions.

It does not know training. The reference is the SSL grid of a held-out region and the region's look.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.model.colour_map import LinearColour
from engine.model.encoders.demo import DemoEncoder
from engine.model.zoomldm import ZoomLDM
from engine.training.checkpoints import save_json, write_atomically
from engine.training.demo.data import Regions, Tile
from engine.training.pictures import as_images, as_pictures


def write_model(model: ZoomLDM, encoder: DemoEncoder, heldout: Regions, out: Path, figures: dict[str, object]) -> None:
    """Write weights as float16 with the encoder inside, training.json and the reference; replace an earlier export.

    Everything is written beside `out` first: save_pretrained rightly refuses a folder with files that are not its own.
    """
    fresh, old = (out.with_name(f".{out.name}.{word}") for word in ("fresh", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.extras["encoder/model"] = encoder.tensors()
    model.save_pretrained(fresh, dtype=torch.float16)
    save_json(fresh / "training.json", figures)
    save_reference(heldout, fresh)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def fit_colour_map(model: ZoomLDM, latents: np.ndarray) -> None:
    """Fit linear guidance's map to base latents (N, 3, 64, 64) and what the decoder makes of them; it is an extra."""
    codes = torch.from_numpy(latents).float()
    images = torch.cat([model.decode(part) for part in codes.to(model.device).split(8)]).float().clamp(-1, 1).cpu()
    model.extras["guidance/linear"] = LinearColour.fit(codes, images).tensors()


@torch.no_grad()
def save_reconstructions(path: Path, model: ZoomLDM, pictures: list[np.ndarray]) -> None:
    """Write pictures uint8 (256, 256, 3) above what the autoencoder makes of them."""
    made = as_pictures(model.decode(model.encode(as_images(pictures).to(model.device))))
    sheet = np.concatenate([np.concatenate(pictures, axis=1), np.concatenate(list(made), axis=1)])
    write_atomically(path, lambda partial: Image.fromarray(sheet).save(partial, format="PNG"))


def save_reference(heldout: Regions, folder: Path) -> None:
    """Write reference.safetensors (grid: float32 (D, k, k)) and reference.png of the most varied coarsest tile.

    A small canvas shows the top left only (a quarter of each side at 1024 px), so that part has to be varied too.
    """
    level = len(heldout.scale.names) - 1
    side = heldout.cells - 2**level + 1
    places = [
        Tile(region, y, x)
        for region in range(len(heldout.folders))
        for y in range(0, side, 2)
        for x in range(0, side, 2)
    ]

    def variety(tile: Tile) -> float:
        picture = heldout.picture(tile, level)
        quarter = picture[: picture.shape[0] // 4, : picture.shape[1] // 4]
        return min(tissue_variety(picture), tissue_variety(quarter))

    best = max(places, key=variety)
    grid = torch.from_numpy(np.ascontiguousarray(heldout.ssl(best, level)))
    picture = Image.fromarray(heldout.picture(best, level))
    write_atomically(folder / "reference.safetensors", lambda partial: save_file({"grid": grid}, partial))
    write_atomically(folder / "reference.png", lambda partial: picture.save(partial, format="PNG"))


def tissue_variety(picture: np.ndarray) -> float:
    """Return the smallest share of white (fat, lumen), blue (nuclei) and pink (stroma) in uint8 (h, w, 3)."""
    red, green, blue = (picture[..., i].astype(int) for i in range(3))
    white = green > 215
    nuclear = ~white & (blue > red)
    return float(min(white.mean(), nuclear.mean(), (~white & ~nuclear).mean()))
