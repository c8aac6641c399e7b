"""The demo model up to its denoiser: autoencoder, SSL encoder, colour maps, reference; every stage done is skipped.

The denoiser is trained as anybody's is, on a set prepared with what this writes. It does not know command lines.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from engine.core.runtime import keep_freed_memory
from engine.training.demo.autoencoder import encode_tiles
from engine.training.demo.cells import encode_regions, fit_encoder
from engine.training.demo.data import HELDOUT_SEED, render_regions
from engine.training.demo.export import fit_colour_map, save_reconstructions, write_model
from engine.training.demo.stages import (
    DEMO_SCALE,
    SSL_DIM,
    build_model,
    heldout_tiles,
    measure_autoencoder,
    train_autoencoder,
)
from engine.training.optimisation import settle
from engine.training.precision import settle_bfloat16
from engine.training.settings import DemoConfig, settled


def train(config: DemoConfig) -> None:
    """Run every stage that is not done yet and write the model to config.out.

    Raises: TrainingError for a run folder of other settings: a stage's file does not say what it was made with.
    """
    torch.set_num_threads(config.threads)
    keep_freed_memory(config.device)
    config = settle_bfloat16(config)
    run = Path(config.run)
    settle(run, asdict(config))
    training, heldout = render_regions(run, config.data, DEMO_SCALE, config.threads)
    model = build_model(config)
    train_autoencoder(model, training, config)
    psnr = measure_autoencoder(model, heldout, config)
    shown = heldout_tiles(heldout, config)
    pictures = [heldout.picture(tiles[0], level) for level, tiles in enumerate(shown)]
    save_reconstructions(run / "reconstructions.png", model, pictures)
    encoder = fit_encoder(training, config.data.encoder_cells, config.seed, run / "encoder.pt")
    if encoder.dim != SSL_DIM:
        raise ValueError(f"the encoder must give {SSL_DIM} numbers a cell; got {encoder.dim}. Delete encoder.pt.")
    encode_regions(encoder, training)  # the CDM learns from these
    encode_regions(encoder, heldout)
    fit_colour_map(model, encode_tiles(model.vae, heldout, 0, shown[0], config.device, settled(config.bfloat16)))
    figures = {
        "config": asdict(config),
        "training_seeds": f"0 to {config.data.train_regions - 1}",
        "heldout_seeds": f"{HELDOUT_SEED} to {HELDOUT_SEED + config.data.heldout_regions - 1}",
        "heldout_psnr_db": psnr,
        "torch": torch.__version__,
    }
    write_model(model, encoder, heldout, Path(config.out), figures)
