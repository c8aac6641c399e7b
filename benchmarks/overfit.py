"""Can the trainer learn at all? Eight patches by heart, from random weights: the loss, and samples beside patches.

    python -m benchmarks.overfit --folder runs/overfit

Prints the loss over the run, and for each patch the similarity (cosine of the demo encoder's standardised vectors) of
its sample to itself and to the seven others. Exit code 1 unless the last loss is below the bound and every sample is
nearest to its own patch.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.phantom_set import write_phantom_set
from engine.model.demo_encoder import DemoEncoder
from engine.model.zoomldm import ZoomLDM
from engine.prepared import PreparedSet
from engine.training import joint
from engine.training.data import as_pictures
from engine.training.heldout import sample_tiles
from engine.training.joint_settings import (
    InitialSettings,
    JointConfig,
    JointSettings,
    NetworkSettings,
    OutputSettings,
    WorkerSettings,
)
from engine.training.settings import PlaceSettings

BOUND = 0.15
"""Of the mean squared error of v over the last tenth of the run; a network that answers zero has about 1."""


def config_of(folder: Path, steps: int, threads: int) -> JointConfig:
    """Return a training of a small network from random weights on the 20x patches alone."""
    networks = NetworkSettings(
        magnifications=("20x", "10x", "5x", "2.5x", "1.25x"), encoder="demo", ssl_dim=64, context=128,
        summarizer_width=128, summarizer_layers=2, summarizer_heads=4, summarizer_mlp=256,
        unet_channels=(32, 64, 96), unet_layers=1, vae_channels=(32, 32, 64), vae_layers=1, vae_attention=False,
        codes=2048, groups=8, prediction_type="v_prediction",
    )  # fmt: skip
    train = JointSettings(
        steps=steps, batch_size=8, lr=2e-3, warmup=10, decay="cosine", ema=0.98, weight_decay=0.0,
        magnification_weights=(1, 0, 0, 0, 0), coarse_weights=(1.0, 1.0),
    )  # fmt: skip
    return JointConfig(
        data=str(folder / "data"), run=str(folder / "run"), device="cpu", threads=threads, log_every=20,
        tensorboard=False, model=networks, initial=InitialSettings(vae="demo"), train=train,
        output=OutputSettings(folder=str(folder / "model")), ray=WorkerSettings(enabled=False),
    )  # fmt: skip


@torch.no_grad()
def similarities(folder: Path, pictures: np.ndarray) -> np.ndarray:
    """Return the cosine of each sample (row) to each patch (column); writes pairs.png."""
    model, data = ZoomLDM.from_pretrained(folder / "model"), PreparedSet(folder / "data")
    encoder = DemoEncoder.from_tensors(ZoomLDM.from_pretrained("demo").extras["encoder/model"])
    grids = [torch.from_numpy(data.example(0, i).grid) for i in range(len(pictures))]
    made = as_pictures(
        model.decode(sample_tiles(model, model.summarize(grids, [0] * len(grids)), seed=3, weight=1.0, stride=50))
    )
    pairs = np.concatenate([np.concatenate(list(row), axis=1) for row in (pictures, made)])
    Image.fromarray(pairs).save(folder / "pairs.png")
    real, fake = (encoder.encode(torch.from_numpy(p).permute(0, 3, 1, 2)).numpy() for p in (pictures, made))
    centre, spread = real.mean(axis=0), real.std(axis=0) + 1e-6  # what all eight share says nothing about which it is
    real, fake = (((v - centre) / spread) for v in (real, fake))
    norms = [np.linalg.norm(v, axis=1, keepdims=True) for v in (real, fake)]
    return (fake / norms[1]) @ (real / norms[0]).T


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/overfit"))
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    pictures = write_phantom_set(options.folder / "data", 2, 4)
    config = config_of(options.folder, options.steps, options.threads)
    # No condition is dropped: what a patch is, given none, cannot be learned by heart. Without a start that knows
    # places, convolutions cannot tell one place of pure noise from another.
    train = replace(config.train, drop_condition=0.0)
    joint.train(replace(config, train=train, places=PlaceSettings(token_steps=300, path_steps=250)))
    lines = [json.loads(line) for line in (options.folder / "run" / "log.jsonl").read_text().splitlines()]
    table = similarities(options.folder, pictures)
    last = float(np.mean([line["loss"] for line in lines[-max(1, len(lines) // 10) :]]))
    own, others = table.diagonal(), np.where(np.eye(len(table), dtype=bool), -1, table).max(axis=1)
    for line in lines[:: max(1, len(lines) // 10)]:
        print(f"step {line['step']:5}  loss {line['loss']:.3f}")
    print(f"last tenth: {last:.3f} (bound {BOUND}); {lines[-1]['seconds']:.0f} s")
    print("own patch:    " + " ".join(f"{v:5.2f}" for v in own))
    print("nearest other:" + " ".join(f"{v:5.2f}" for v in others))
    return 0 if last < BOUND and bool((own > others).all()) else 1


if __name__ == "__main__":
    sys.exit(main())
