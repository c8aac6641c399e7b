"""What does each way of steering cost, and what does it buy? One run, equal settings.

    python -m benchmarks.guidance [--canvas 768] [--methods none,linear,probe,newton] [--settings key=value,...]

Per method: PSNR of the reduced canvas against its guide, seam score, detail (mean gradient of the canvas), network
calls and seconds of sampling. The condition is the first held-out phantom of benchmarks.quality.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from benchmarks.bare import demo_config
from benchmarks.quality import HeldOut, held_out
from engine.config import GuidanceConfig, RunConfig
from engine.devices import hardware_of
from engine.image import Image
from engine.model.encoders import load_encoder
from engine.model.zoomldm import ZoomLDM
from engine.predict import DecodeBatch, DecodedBatch, LocalDenoiser, TileBatch, TilePrediction, one_by_one
from engine.progress import Progress
from engine.run import Crew, pin_arithmetic, prepare, run


@dataclass
class Counting:
    """LocalDenoiser that counts what the network is asked for, padding included."""

    inner: LocalDenoiser
    unet: int = 0
    autoencoder: int = 0
    compute_s: float = 0.0

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        for batch in one_by_one(batches):
            start = time.perf_counter()
            yield self.inner.denoise_batch(batch)
            self.compute_s += time.perf_counter() - start
            passes = 2 if batch.weight else 1
            corrections = batch.newton.corrections if batch.newton else 0
            self.unet += len(batch.x_t) * passes * (1 + 2 * corrections)
            self.autoencoder += len(batch.x_t) * 3 * corrections

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        for batch in batches:
            self.autoencoder += len(batch.latents)
            yield self.inner.decode_batch(batch)


def measure(region: HeldOut, size: int, guidance: GuidanceConfig, keep: Path | None) -> dict[str, object]:
    """Make one canvas; return its figures."""
    counters: list[Counting] = []

    @contextmanager
    def engage(model: ZoomLDM, config: RunConfig) -> Iterator[Crew]:
        pin_arithmetic(config.model.threads)
        counters.append(Counting(LocalDenoiser(model)))
        yield Crew(counters[0], hardware_of("cpu"), lambda: 1, lambda: {})

    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "reference.png"
        PIL.Image.fromarray(region.pixels[:size, :size]).save(picture)
        config = demo_config(size, {"reference": picture, "output.folder": f"{folder}/run", "output.formats": []})
        out = run(prepare(replace(config, guidance=guidance)), engage, Progress())
        report = json.loads((out / "report.json").read_text())
        canvas = Image.open(out / "image.ome.zarr").read(0, size, 0, size).astype(np.float32)
        if keep is not None:
            (out / "preview.png").rename(keep)
    return {
        "method": guidance.method,
        "consistency_psnr_db": report["consistency_psnr_db"],
        "seam_score": report["seam_score"],
        "detail": float(np.abs(np.diff(canvas, axis=-1)).mean()),
        "unet_calls": counters[0].unet,
        "autoencoder_calls": counters[0].autoencoder,
        "sampling_s": report["timings_s"]["sampling"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guidance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--canvas", type=int, default=768, help="px of the canvas")
    parser.add_argument("--methods", default="none,linear,probe,newton")
    parser.add_argument("--settings", default="", help="guidance keys for all methods, e.g. damping=0.05,strength=1")
    parser.add_argument("--previews", type=Path, help="folder for a preview per method")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    pin_arithmetic(2)
    model = ZoomLDM.from_pretrained("demo")
    (region,) = held_out(1, load_encoder(model.config.encoder, None, model.extras, "cpu", torch.float32))
    pairs = [pair.split("=") for pair in arguments.settings.split(",") if pair]
    fields = {key: type(getattr(GuidanceConfig(), key))(float(value)) for key, value in pairs}
    rows = []
    for method in arguments.methods.split(","):
        guidance = GuidanceConfig(method=method, **fields)
        keep = arguments.previews / f"{method}.png" if arguments.previews else None
        rows.append(measure(region, arguments.canvas, guidance, keep) | {"settings": arguments.settings})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
