"""Is the demo picture right? Measured on held-out phantom seeds (10000 and up, which the trainer never sees).

    python -m benchmarks.quality.quality [--regions 2] [--canvas 2048] [--tiles 24] [--json FILE]

Autoencoder PSNR and embedding similarity per magnification; consistency with the guide and seam score of whole
canvases, steered and not. Figures are of pictures, not of time, so a busy machine does not matter.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from benchmarks.support.arguments import figures_parser, write_json
from benchmarks.support.bare import demo_config
from engine.conditions.patch_sampler import PatchSampler
from engine.conditions.reference import embedding_grid
from engine.core.progress import Progress
from engine.core.runtime import pin_arithmetic
from engine.generation.run import prepare, run
from engine.generation.session import local_backend
from engine.model.encoders.registry import load_encoder
from engine.model.zoomldm import ZoomLDM
from engine.sampling.pixels import to_uint8
from engine.slides.phantom.render import Phantom
from engine.training.demo.data import HELDOUT_SEED, box_average

CELLS = 16
"""Held-out regions are 16×16 cells: 4096² px at 20x, one patch at 1.25x."""
COMPARED = 4
"""Fewer patches are not compared with each other."""


@dataclass(frozen=True)
class HeldOut:
    """One held-out region and its SSL grid."""

    pixels: np.ndarray
    grid: np.ndarray

    def patch(self, y: int, x: int, factor: int) -> np.ndarray:
        """Return the picture of factor×factor cells at their magnification: uint8 (256, 256, 3)."""
        window = self.pixels[y * 256 : (y + factor) * 256, x * 256 : (x + factor) * 256]
        return box_average(window, factor)


def held_out(count: int, encoder, cells: int = CELLS) -> list[HeldOut]:
    """Render regions of `cells` cells on each axis, far from where the trainer's held-out regions lie."""
    found = []
    for i in range(count):
        pixels = Phantom.varied(HELDOUT_SEED + 100 + i).render(0, 0, cells * 256, cells * 256, 0.5)
        found.append(HeldOut(pixels, embedding_grid(pixels, encoder)))
    return found


def places(factor: int, regions: int, count: int) -> list[tuple[int, int, int]]:
    """Return (region, y, x) of `count` patches spread over the regions."""
    side = CELLS - factor + 1
    total = regions * side * side
    picked = [i * total // count for i in range(min(count, total))]
    return [(i // (side * side), i % (side * side) // side, i % side) for i in picked]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the PSNR in dB of two uint8 pictures."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def as_images(patches: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).float() / 127.5 - 1


def own_against_others(drawn: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Compare embeddings (N, D) of drawn patches with those of their references.

    `own_wins` is the share of (patch, other reference) pairs in which its own reference is closer; `rank1` the share of
    patches whose own reference is closest of all.
    """
    centred = [v - references.mean(0) for v in (drawn, references)]
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in centred]
    similarity = unit[0] @ unit[1].T
    own = np.diag(similarity)[:, None]
    others = ~np.eye(len(own), dtype=bool)
    return {
        "similarity_own": float(own.mean()),
        "similarity_others": float(similarity[others].mean()),
        "own_wins": float((own > similarity)[others].mean()),
        "rank1": float((similarity.argmax(1) == np.arange(len(own))).mean()),
    }


@torch.inference_mode()
def patch_figures(model: ZoomLDM, encoder, regions: list[HeldOut], count: int, sheet: Path | None) -> dict[str, object]:
    """Measure autoencoder and patch sampler at every magnification."""
    figures: dict[str, object] = {}
    rows = []
    for name in model.config.magnifications:
        index, factor = model.config.scale.index(name), model.config.scale.factor(name)
        spots = places(factor, len(regions), count)
        patches = [regions[r].patch(y, x, factor) for r, y, x in spots]
        cells = [regions[r].grid[:, y : y + factor, x : x + factor] for r, y, x in spots]
        drawn, coded = [], []
        sampler = PatchSampler("ddim", 50, 2.0, seed=0)
        for i in range(0, len(spots), 8):
            drawn.append(to_uint8(sampler.draw(model, cells[i : i + 8], index, i)))
            coded.append(to_uint8(model.decode(model.encode(as_images(patches[i : i + 8]))).float().numpy()))
        pictures = np.concatenate(drawn)
        codes = np.concatenate(coded).transpose(0, 2, 3, 1)
        wanted = np.stack(patches).transpose(0, 3, 1, 2)
        embeddings = [encoder.encode(torch.from_numpy(np.ascontiguousarray(v))).numpy() for v in (pictures, wanted)]
        reconstruction = [psnr(a, b) for a, b in zip(codes, patches, strict=True)]
        figures[name] = {
            "patches": len(spots),
            "autoencoder_psnr_db": float(np.mean(reconstruction)),
            **(own_against_others(*embeddings) if len(spots) >= COMPARED else {}),
        }
        print(name, json.dumps(figures[name]), flush=True)
        rows.append(
            np.concatenate(
                [np.concatenate(p, 1) for p in zip(patches, pictures.transpose(0, 2, 3, 1), strict=True)][:4], 1
            )
        )
    if sheet is not None:
        width = max(row.shape[1] for row in rows)  # a region holds few patches at the lowest magnification
        rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
        PIL.Image.fromarray(np.concatenate(rows)).save(sheet)
    return figures


def canvas_figures(region: HeldOut, size: int, method: str, folder: Path) -> dict[str, object]:
    """Run command 1's path on a held-out region and read its own report."""
    picture = folder / "reference.png"
    PIL.Image.fromarray(region.pixels[:size, :size]).save(picture)
    settings = {"reference": picture, "guidance.method": method, "output.folder": folder / method, "output.formats": []}
    out = run(prepare(demo_config(size, settings)), local_backend, Progress())
    report = json.loads((out / "report.json").read_text())
    return {key: report[key] for key in ("size_px", "guidance", "consistency_psnr_db", "seam_score")}


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--regions", type=int, default=2, help="held-out phantom slides")
    parser.add_argument("--canvas", type=int, default=2048, help="px of each canvas; 0 leaves canvases out")
    parser.add_argument("--tiles", type=int, default=24, help="patches per magnification")
    parser.add_argument("--methods", default="linear,none", help="guidance of the canvases")
    parser.add_argument("--sheet", type=Path, help="PNG of reference and drawn patches, one row per magnification")
    arguments = parser.parse_args()
    pin_arithmetic(2)
    model = ZoomLDM.from_pretrained("demo", dtype=torch.bfloat16).channels_last()
    encoder = load_encoder(model.config.encoder, None, model.extras, "cpu", torch.float32)
    regions = held_out(arguments.regions, encoder)
    figures = {"patches": patch_figures(model, encoder, regions, arguments.tiles, arguments.sheet), "canvases": []}
    for i, region in enumerate(regions if arguments.canvas else []):
        for method in arguments.methods.split(","):
            with tempfile.TemporaryDirectory() as folder:
                found = {"region": i, **canvas_figures(region, arguments.canvas, method, Path(folder))}
            figures["canvases"].append(found)
            print(json.dumps(found), flush=True)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
