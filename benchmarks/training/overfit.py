"""Can the trainer learn at all? Eight patches by heart, from random weights: the loss, and samples beside patches.

    python -m benchmarks.training.overfit --folder runs/overfit

Patches of 1.25x, each of a phantom of its own: 8 x 8 cells of the condition say what lies where. Prints the loss over
the run, and for each patch the similarity (cosine of the demo encoder's vectors, standardised over the eight) of its
sample to itself and to the seven others. Exit code 1 unless the last loss is below the bound and every sample is
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

from benchmarks.support.phantom_set import DemoNetworks, write_piece
from engine.datasets.dataset import PreparedSet
from engine.model.zoomldm import ZoomLDM
from engine.training.demo.data import HELDOUT_SEED
from engine.training.demo.stages import DEMO_SCALE
from engine.training.denoiser import train as denoiser_training
from engine.training.denoiser.settings import (
    InitialSettings,
    JointConfig,
    JointSettings,
    NetworkSettings,
    OutputSettings,
    WorkerSettings,
)
from engine.training.denoiser.validation import sample_tiles
from engine.training.pictures import as_pictures
from engine.training.settings import PlaceSettings

PATCHES, LEVEL = 8, 4
BOUND = 0.15
"""Of the loss over the last tenth of the run: the mean squared error of v and of its means over 8 x 8 and 64 x 64
squares; a network that answers zero has about 1.4."""


def config_of(folder: Path, steps: int, threads: int) -> JointConfig:
    """Return a training of a small network from random weights, by default on the 20x patches alone."""
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


def by_heart(config: JointConfig) -> JointConfig:
    """Return the training on the patches of one magnification, without anything that cannot be learned by heart."""
    weights = tuple(float(i == LEVEL) for i in range(len(config.model.magnifications)))
    # A dropped condition does not say which patch it was. Without a start that knows places, convolutions cannot tell
    # one place of pure noise from another.
    train = replace(config.train, lr=1e-3, drop_condition=0.0, magnification_weights=weights)
    return replace(config, train=train, places=PlaceSettings(token_steps=300, path_steps=250))


def write_patches(folder: Path, networks: DemoNetworks) -> PreparedSet:
    """Make what is missing of the set: one patch of each phantom."""
    name = DEMO_SCALE.names[LEVEL]
    for seed in range(PATCHES):
        write_piece(folder, networks, HELDOUT_SEED + seed, DEMO_SCALE.factor(name), {name: 1})
    return PreparedSet(folder)


@torch.no_grad()
def similarities(folder: Path, data: PreparedSet, networks: DemoNetworks) -> np.ndarray:
    """Return the cosine of each sample (row) to each patch (column); writes pairs.png."""
    model = ZoomLDM.from_pretrained(folder / "model")
    grids = [torch.from_numpy(data.example(LEVEL, i).grid) for i in range(PATCHES)]
    context = model.summarize(grids, [LEVEL] * PATCHES)
    made = as_pictures(model.decode(sample_tiles(model, context, seed=3, weight=0.0, stride=50)))
    pictures = np.stack([data.image(LEVEL, i) for i in range(PATCHES)])
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in (pictures, made)])).save(
        folder / "pairs.png"
    )
    real, fake = networks.vectors(pictures), networks.vectors(made)
    centre, spread = real.mean(axis=0), real.std(axis=0) + 1e-6  # what all eight share says nothing about which it is
    real, fake = (((v - centre) / spread) for v in (real, fake))
    norms = [np.linalg.norm(v, axis=1, keepdims=True) for v in (real, fake)]
    return (fake / norms[1]) @ (real / norms[0]).T


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/overfit"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    networks = DemoNetworks()
    data = write_patches(options.folder / "data", networks)
    denoiser_training.train(by_heart(config_of(options.folder, options.steps, options.threads)))
    lines = [json.loads(line) for line in (options.folder / "run" / "log.jsonl").read_text().splitlines()]
    table = similarities(options.folder, data, networks)
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
