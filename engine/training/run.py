"""One training run from pixels to a model folder; every stage that is done on disk is skipped.

It does not know command lines.
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path

import torch

from engine.model.demo_encoder import DemoEncoder
from engine.model.zoomldm import ZoomLDM
from engine.training.cells import encode_regions, fit_encoder
from engine.training.checkpointing import save_json
from engine.training.data import HELDOUT_SEED, Regions, render_regions
from engine.training.denoiser import (
    DenoiserNetworks,
    LatentTiles,
    cache_latents,
    draw_batch,
    guided_loss,
    heldout_eps_error,
    look_up_share,
)
from engine.training.export import fit_colour_maps, write_model
from engine.training.figures import save_reconstructions, save_samples
from engine.training.initial import start_with_places
from engine.training.loop import Optimisation
from engine.training.places import AttentionWatch
from engine.training.settings import TrainingConfig
from engine.training.stages import (
    DEMO_SCALE,
    SSL_DIM,
    build_model,
    heldout_tiles,
    measure_autoencoder,
    train_autoencoder,
)

log = logging.getLogger(__name__)


def train(config: TrainingConfig) -> None:
    """Run every stage that is not done yet and write the model to config.out."""
    torch.set_num_threads(config.threads)
    run = Path(config.run)
    save_json(run / "config.json", asdict(config))
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
    encode_regions(encoder, training)
    encode_regions(encoder, heldout)
    train_denoiser(model, training, heldout, encoder, psnr, config)


def train_denoiser(
    model: ZoomLDM,
    training: Regions,
    heldout: Regions,
    encoder: DemoEncoder,
    psnr: dict[str, float],
    config: TrainingConfig,
) -> None:
    """Train U-Net and Summarizer; export the averaged weights now and then and at the end."""
    run, settings = Path(config.run), config.train
    tiles = [training.tiles(i, count, config.seed) for i, count in enumerate(config.data.train_tiles)]
    data, test = (
        cache_latents(model, regions, chosen, run / "latents" / name, config.device, config.bfloat16)
        for name, regions, chosen in (
            ("train", training, tiles),
            ("heldout", heldout, heldout_tiles(heldout, config)),
        )
    )
    model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    taught = config.initial is None and config.places.token_steps > 0
    if taught:
        start_with_places(model, data, config)
    watch = AttentionWatch(model.unet)
    networks = DenoiserNetworks(model).train()
    optimisation = Optimisation(networks, settings, run / "denoiser.pt", config.checkpoint_s, config.threads)
    reported = [time.monotonic()]

    def report(state: Optimisation) -> None:
        done = state.step == settings.steps
        if not done and not (config.picture_s and time.monotonic() - reported[0] >= config.picture_s):
            return
        export_average(model, state, test, encoder, psnr, config)
        reported[0] = time.monotonic()

    def loss_of(step: int, share: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = draw_batch(data, settings, config.seed, step, config.device).share(share, optimisation.shares)
        weight = look_up_share(config.places, step) if taught else 0.0
        return guided_loss(model, batch, settings, config.bfloat16, watch, weight)

    optimisation.run(loss_of, report)


def export_average(
    model: ZoomLDM,
    state: Optimisation,
    heldout: LatentTiles,
    encoder: DemoEncoder,
    psnr: dict[str, float],
    config: TrainingConfig,
) -> None:
    """Measure, picture and write the averaged weights; the weights in training stay as they were."""
    state.average.exchange(state.module)
    errors = heldout_eps_error(model, heldout, config.device, config.bfloat16)
    log.info("step %d: held-out eps error %s", state.step, errors)
    save_samples(
        Path(config.run) / f"samples_{state.step:06d}.png", model, heldout, config.picture_stride, config.bfloat16
    )
    figures = {
        "config": asdict(config),
        "training_seeds": f"0 to {config.data.train_regions - 1}",
        "heldout_seeds": f"{HELDOUT_SEED} to {HELDOUT_SEED + config.data.heldout_regions - 1}",
        "steps": state.step,
        "skipped_steps": state.skipped,
        "denoiser_minutes": round(state.seconds / 60, 1),
        "heldout_psnr_db": psnr,
        "heldout_eps_mse": errors,
        "torch": torch.__version__,
    }
    fit_colour_maps(model, heldout.latents[0])
    write_model(model, encoder, heldout.regions, Path(config.out), figures)
    state.average.exchange(state.module)
