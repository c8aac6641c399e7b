"""A tiny prepared set whose latents some autoencoder could have made, and a tiny training on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.datasets.schema import SetFacts
from engine.datasets.writer import open_set
from engine.model.zoomldm import ZoomLDM, autoencoder_digest
from engine.training.denoiser.settings import (
    InitialSettings,
    JointConfig,
    JointSettings,
    NetworkSettings,
    OutputSettings,
    WorkerSettings,
)
from engine.training.denoiser.train import DenoiserLesson, network_config
from engine.training.trainer import ALONE, Learning
from tests.support.known_prepared import FACTS, write_slide

NAMES = ("20x", "10x", "5x", "2.5x")
NETWORKS = NetworkSettings(
    magnifications=NAMES, encoder="demo", ssl_dim=16, context=32, summarizer_width=32, summarizer_layers=1,
    summarizer_heads=8, summarizer_mlp=64, unet_channels=(8, 8), unet_layers=1, vae_channels=(8, 8, 8),
    vae_layers=1, vae_attention=False, codes=64, groups=4,
)  # fmt: skip
LDM_NETWORKS = replace(
    NETWORKS, unet_channels=(32, 32), vae_channels=(32, 32, 32), vae_attention=True, groups=32
)  # fmt: skip
"""Whose form the published layout can express."""
PLACES = {name: [(0, 0), (0, 0) if k == 8 else (0, k)] for name, k in zip(NAMES, (1, 2, 4, 8), strict=True)}
LEARN = JointSettings(steps=6, batch_size=4, lr=1e-3, warmup=2, ema=0.9, max_skipped=1)


def write_autoencoder(folder: Path, networks: NetworkSettings = NETWORKS) -> SetFacts:
    """Write a random model to take the autoencoder from; return what a set prepared with it says."""
    torch.manual_seed(7)
    model = ZoomLDM(network_config(networks))
    model.save_pretrained(folder)
    return replace(FACTS, magnifications=NAMES, autoencoder_digest=autoencoder_digest(model))


def write_data(folder: Path, facts: SetFacts, images: bool = False, without: str | None = None) -> Path:
    """Write two slides with two patches of each magnification but `without`."""
    open_set(folder, facts)
    places = {name: found for name, found in PLACES.items() if name != without}
    for slide in ("left", "right"):
        write_slide(folder, facts, slide, places, cells=(8, 8), images=images)
    return folder


def tiny_config(root: Path, run: str = "run", train: JointSettings = LEARN, **changes: Any) -> JointConfig:
    """Return a training of a few steps in this process; `root` holds `data` and `vae`."""
    values: dict[str, Any] = {
        "data": str(root / "data"), "run": str(root / run), "device": "cpu", "precision": "float32", "threads": 1,
        "loaders": 1, "checkpoint_s": 1e-9, "log_every": 2, "tensorboard": False, "model": NETWORKS,
        "initial": InitialSettings(vae=str(root / "vae")), "train": train, "ray": WorkerSettings(enabled=False),
        "output": OutputSettings(folder=str(root / run / "model")),
    }  # fmt: skip
    return JointConfig(**(values | changes))


def learning(config: JointConfig) -> Learning:
    """Return a training in this process, on one thread."""
    torch.set_num_threads(1)
    return Learning(config, DenoiserLesson(config), config.train, ALONE)
