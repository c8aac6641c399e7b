"""What does each way of drawing a canvas from its guide cost, and what does it keep? One run per recipe and reference.

    python -m benchmarks.sampling.guidance [--canvas 1024] [--references 3] [--recipes joint,begun,demo] \
        [--set KEY=VALUE]

The references are held-out phantoms (benchmarks.quality.quality). Per recipe: agreement with the guide, seam score,
gradient and dark share of tissue relative to single patches of the same conditions (50 steps of DDIM, w of
configs/demo.yaml), KID and Fréchet distance of crops to the references themselves beside those of the patches (texture
encoder, standardised), network calls, seconds. A canvas has one crop per cell and so has the set of patches, so random
halves of the cells give each ratio an interval. With --previews, look at the pictures: a figure can hide a bad one.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from benchmarks.quality.quality import HeldOut, held_out
from benchmarks.support.arguments import figures_parser, write_json
from benchmarks.support.bare import demo_config
from engine.conditions.patch_sampler import PatchSampler
from engine.core.progress import Progress
from engine.core.runtime import hardware_of, pin_arithmetic
from engine.core.units import TILE_PX
from engine.evaluation.measures.distances import frechet_distance, squared_mmd
from engine.evaluation.samples.vectors import encode
from engine.generation.run import prepare, run
from engine.generation.session import Backend
from engine.images.detail import Detail, DetailSums, ratios
from engine.images.ome_zarr import Image
from engine.model.encoders.registry import load_encoder
from engine.model.encoders.texture import TextureEncoder
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig
from engine.sampling.denoiser import (
    DecodeBatch,
    DecodedBatch,
    EncodeBatch,
    EncodedBatch,
    LocalDenoiser,
    TileBatch,
    TilePrediction,
    one_by_one,
)
from engine.sampling.pixels import to_uint8

JOINT: dict[str, object] = {
    "sampling.from_guide": 0,
    "sampling.stride": 40,
    "guidance.cell": 1,
    "guidance.strength": 1.0,
}
RECIPES: dict[str, dict[str, object]] = {
    "none": JOINT | {"guidance.method": "none"},
    "joint": JOINT,
    "joint, cells of 4": JOINT | {"guidance.cell": 4},
    "begun": {"guidance.method": "none"},
    "demo": {},
    "published": JOINT
    | {
        "sampling.stride": 50, "sampling.weight": 2.0, "sampling.tile_stride": 64, "sampling.tile_weights": "uniform",
        "guidance.method": "newton", "guidance.to_t": 1, "refine.start": 300, "decode.tile_stride": 16,
        "decode.sigma": 0.8,
    },
}  # fmt: skip
"""Keys over configs/demo.yaml. `joint` is what the demo was: all levels at one t, every latent px pulled to the guide;
`begun` begins from the guide and does not steer; `published` is configs/brca_published.yaml's."""
PATCH_STEPS = 50
Pixels = NDArray[np.uint8]
"""(n, 3, 256, 256) or (3, h, w)."""


@dataclass
class Counting:
    """LocalDenoiser that counts what the networks are asked for, padding included."""

    inner: LocalDenoiser
    unet: int = 0
    decoded: int = 0
    encoded: int = 0

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        for batch in one_by_one(batches):
            yield self.inner.denoise_batch(batch)
            n, corrections = len(batch.x_t), batch.newton.corrections if batch.newton else 0
            self.unet += n * (2 if batch.weight else 1) * (1 + 2 * corrections)
            self.decoded += n * corrections
            self.encoded += 2 * n * corrections

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        for batch in batches:
            self.decoded += len(batch.latents)
            yield self.inner.decode_batch(batch)

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        for batch in batches:
            self.encoded += len(batch.guide.px)
            yield self.inner.encode_batch(batch)


@dataclass(frozen=True)
class Reference:
    """One held-out region of a canvas's size, its own crops, and single patches drawn on its conditions."""

    pixels: Pixels
    patches: Pixels
    detail: Detail


def draw_reference(region: HeldOut, size: int, model: ZoomLDM, weight: float) -> Reference:
    """Draw one patch per cell under a canvas of `size` px."""
    n = size // TILE_PX
    cells = [region.grid[:, y : y + 1, x : x + 1] for y in range(n) for x in range(n)]
    sampler = PatchSampler("ddim", PATCH_STEPS, 1 + weight, seed=0)
    parts = [to_uint8(sampler.draw(model, cells[i : i + 8], 0, i)) for i in range(0, len(cells), 8)]
    patches, sums = np.concatenate(parts), DetailSums()
    for patch in patches:
        sums.add(patch)
    return Reference(np.ascontiguousarray(region.pixels[:size, :size].transpose(2, 0, 1)), patches, sums.result())


def crops(picture: Pixels, stride: int) -> Pixels:
    """Return all 256² crops at a stride: (n, 3, 256, 256)."""
    starts = range(0, picture.shape[1] - TILE_PX + 1, stride)
    return np.stack([picture[:, y : y + TILE_PX, x : x + TILE_PX] for y in starts for x in starts])


@dataclass(frozen=True)
class DrawnCanvas:
    """One canvas, what its run says of it, and the calls it took."""

    pixels: Pixels
    said: dict[str, Any]
    calls: Counting


def draw_canvas(reference: Reference, size: int, recipe: Mapping[str, object], keep: Path | None) -> DrawnCanvas:
    """Make one canvas, and keep its picture if a file is named."""
    counters: list[Counting] = []

    @contextmanager
    def start_backend(model: ZoomLDM, config: RunConfig) -> Iterator[Backend]:
        pin_arithmetic(config.model.threads)
        counters.append(Counting(LocalDenoiser(model)))
        yield Backend(counters[0], hardware_of("cpu"), lambda: 1, lambda: {})

    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "reference.png"
        PIL.Image.fromarray(reference.pixels.transpose(1, 2, 0)).save(picture)
        keys = {"reference": picture, "output.folder": f"{folder}/run", "output.formats": []} | dict(recipe)
        out = run(prepare(demo_config(size, keys)), start_backend, Progress())
        said = json.loads((out / "report.json").read_text())
        pixels = Image.open(out / "image.ome.zarr").read(0, size, 0, size)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels.transpose(1, 2, 0)).save(keep)
    return DrawnCanvas(pixels, said, counters[0])


def measure(name: str, recipe: Mapping[str, object], references: list[Reference], size: int,
            previews: Path | None) -> dict[str, object]:  # fmt: skip
    """Draw a canvas on each reference; return the means of their figures."""
    rows, drawn = [], []
    for number, reference in enumerate(references):
        keep = None if previews is None else previews / f"{name.replace(', ', '_').replace(' ', '_')}_{number}.png"
        found = draw_canvas(reference, size, recipe, keep)
        pixels, said, calls = found.pixels, found.said, found.calls
        sums = DetailSums()
        sums.add(pixels)
        kept = ratios(sums.result(), reference.detail)
        times = said["timings_s"]
        rows.append([
            said["consistency_psnr_db"], said["seam_score"], said["seam_control"], kept["gradient"], kept["dark_share"],
            calls.unet, calls.decoded + calls.encoded, times["sampling"] + times["decoding"],
        ])  # fmt: skip
        drawn.append(crops(pixels, TILE_PX))
    names = ("consistency_db", "seam", "seam_control", "gradient", "dark", "unet_calls", "autoencoder_calls", "seconds")
    means = dict(zip(names, np.mean(rows, axis=0).round(3).tolist(), strict=True))
    own = np.concatenate([crops(r.pixels, TILE_PX // 2) for r in references])
    patches = np.concatenate([r.patches for r in references])
    return {"recipe": name, **means, **distances_to(own, np.concatenate(drawn), patches)}


def distances_to(real: Pixels, drawn: Pixels, patches: Pixels, halves: int = 200) -> dict[str, object]:
    """Return KID and Fréchet distance (texture vectors standardised by the real ones) of two sets to the real one.

    Row k of both is of one cell. Each ratio has the 2.5 and 97.5 % of what random halves of the cells give: a half
    without replacement scatters as the whole set would if it were drawn again.
    """
    encoder = TextureEncoder()
    vectors = [encode(encoder, pixels).astype(np.float64) for pixels in (real, drawn, patches)]
    mean, spread = vectors[0].mean(axis=0), vectors[0].std(axis=0) + 1e-6
    own, *sets = [(v - mean) / spread for v in vectors]
    rng, found = np.random.default_rng(0), {}
    parts = [rng.permutation(len(drawn))[: (len(drawn) + 1) // 2] for _ in range(halves)]
    for name, measure_of in (("kid", squared_mmd), ("frechet", frechet_distance)):
        values = [measure_of(v, own) for v in sets]
        ratio = [measure_of(sets[0][rows], own) / measure_of(sets[1][rows], own) for rows in parts]
        found |= {name: round(values[0], 3), f"{name}_of_patches": round(values[1], 3)}
        found[f"{name}_ratio"] = np.round([values[0] / values[1], *np.percentile(ratio, [2.5, 97.5])], 2).tolist()
    return found


def prepare_references(count: int, size: int) -> list[Reference]:
    """Render held-out phantoms and draw the single patches on their conditions."""
    model = ZoomLDM.from_pretrained("demo").channels_last()
    encoder = load_encoder(model.config.encoder, None, model.extras, "cpu", torch.float32)
    weight = demo_config(size, {}).sampling.weight
    return [draw_reference(region, size, model, weight) for region in held_out(count, encoder, size // TILE_PX)]


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--canvas", type=int, default=1024, help="px of the canvas")
    parser.add_argument("--references", type=int, default=3, help="held-out phantoms")
    parser.add_argument(
        "--recipes", default="joint,begun,demo", help=f"of {', '.join(RECIPES)}, separated by ';' or ','"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key for all recipes")
    parser.add_argument("--previews", type=Path, help="folder for the canvases")
    arguments = parser.parse_args()
    pin_arithmetic(2)
    changes: dict[str, object] = dict(pair.split("=", 1) for pair in arguments.set)
    references = prepare_references(arguments.references, arguments.canvas)
    rows = []
    for name in arguments.recipes.split(";" if ";" in arguments.recipes else ","):
        row = measure(name, RECIPES[name] | changes, references, arguments.canvas, arguments.previews)
        rows.append({**row, "canvas": arguments.canvas, "references": arguments.references, "set": arguments.set})
        print(json.dumps(rows[-1]), flush=True)
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
