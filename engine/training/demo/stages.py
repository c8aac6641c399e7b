"""The demo model's autoencoder, stage by stage, and what the model is built as.

Invariant: every stage leaves a file when it is done and is skipped when that file exists, so the same command
continues a killed run. It does not know command lines.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.core.units import MagnificationScale
from engine.model.config import ConditionerConfig, ModelConfig, unet_arguments, vae_arguments
from engine.model.zoomldm import ZoomLDM
from engine.training.checkpoints import load_checkpoint, save_checkpoint, save_json
from engine.training.demo import autoencoder as ae
from engine.training.demo.data import Regions, Tile
from engine.training.optimisation import Optimisation, step_rng
from engine.training.settings import DemoConfig, ModelSettings, OptimiserSettings, settled

log = logging.getLogger(__name__)

DEMO_SCALE = MagnificationScale(("20x", "10x", "5x", "2.5x", "1.25x"), 0.5)
SSL_DIM = 64


def model_config(settings: ModelSettings) -> ModelConfig:
    """Return the config of the model that is trained."""
    channels = settings.unet_channels
    attention = (False,) + (True,) * (len(channels) - 1)
    unet = unet_arguments(channels, attention, heads=1, layers=settings.unet_layers, context=settings.context)
    # Self-attention among 32×32 tokens is 30 % of a training step; there the tokens only look at the condition.
    unet |= {"only_cross_attention": [False, True] + [False] * (len(channels) - 2)}
    vae = vae_arguments(settings.vae_channels, layers=1, codes=settings.codes)
    # No attention in the autoencoder: it would tie every pixel of a decoded window to the window's border.
    vae |= {"norm_num_groups": settings.groups, "mid_block_add_attention": False}
    width = settings.context
    return ModelConfig(
        magnifications=DEMO_SCALE.names,
        base_mpp=DEMO_SCALE.base_mpp,
        ssl_dim=SSL_DIM,
        encoder="demo",
        conditioner=ConditionerConfig(
            output_dim=width, width=width, layers=settings.summarizer_layers, heads=settings.heads, mlp=2 * width
        ),
        unet=unet | {"norm_num_groups": settings.groups},
        vae=vae,
        prediction_type="v_prediction",
    )


def build_model(config: DemoConfig) -> ZoomLDM:
    """Return the model with the initial weights of the seed."""
    torch.manual_seed(config.seed)
    model = ZoomLDM(model_config(config.model))
    for parameter in model.unet.conv_out.parameters():
        nn.init.zeros_(parameter)  # as diffusion networks' output layers start
    return model.to(config.device)


def train_autoencoder(model: ZoomLDM, train: Regions, config: DemoConfig) -> None:
    """Train both stages of the autoencoder, or load the finished one."""
    run, vae, settings = Path(config.run), model.vae, config.autoencoder
    finished = run / "autoencoder.pt"
    if finished.exists():
        vae.load_state_dict(load_checkpoint(finished)["vae"])
        return
    crops = ae.Crops(train, settings.crop_px, config.seed)

    def batch(stage: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        shares = settings.plain_shares if stage == ae.PLAIN else settings.quantised_shares
        images = crops.batch(stage, step, size, shares).to(config.device)
        noise = step_rng(config.seed, stage + 100, step).standard_normal(
            (size, 3, images.shape[2] // 4, images.shape[3] // 4), dtype=np.float32
        )
        return images, torch.from_numpy(noise).to(config.device)

    vae.requires_grad_(True).train()
    plain = ae.PlainAutoencoder(vae).to(config.device)
    _optimise(
        plain, settings.plain, run / "plain.pt", config,
        lambda step, _part: ae.plain_loss(
            plain, *batch(ae.PLAIN, step, settings.plain.batch_size), settings, settled(config.bfloat16)),
    )  # fmt: skip
    fit_codebook(model, train, config)
    vae.requires_grad_(False)
    decoder = ae.QuantisedDecoder(vae).requires_grad_(True)
    _optimise(
        decoder, settings.quantised, run / "quantised.pt", config,
        lambda step, _part: ae.quantised_loss(
            vae, *batch(ae.QUANTISED, step, settings.quantised.batch_size), settings, settled(config.bfloat16)),
    )  # fmt: skip
    vae.requires_grad_(False).eval()
    save_checkpoint(finished, {"vae": vae.state_dict()})


def _optimise(module: nn.Module, settings: OptimiserSettings, path: Path, config: DemoConfig, loss) -> None:
    """Run a stage and leave the averaged weights in the module."""
    optimisation = Optimisation(module, settings, path, config.checkpoint_s)
    optimisation.run(loss)
    optimisation.average.exchange(module)


def fit_codebook(model: ZoomLDM, train: Regions, config: DemoConfig) -> None:
    """Standardise the latents over training tiles and set the codes to k-means of them."""
    latents = []
    for level, count in enumerate(config.data.train_tiles):
        tiles = train.tiles(level, count, config.seed)[: max(1, count // 30)]
        latents.append(ae.encode_tiles(model.vae, train, level, tiles, config.device, settled(config.bfloat16)))
    points = torch.from_numpy(np.concatenate(latents)).float().permute(0, 2, 3, 1).reshape(-1, 3)
    std, mean = torch.std_mean(points, dim=0)
    log.info("latents before standardisation: mean %s, deviation %s", mean.tolist(), std.tolist())
    ae.fold_standardisation(model.vae, mean.to(config.device), std.to(config.device))
    rng = step_rng(config.seed, ae.QUANTISED, -1 % 2**31)
    some = points[torch.from_numpy(rng.choice(len(points), min(len(points), 150_000), replace=False))]
    codes = ae.lloyd_codebook((some - mean) / std, config.model.codes, 12, rng)
    with torch.no_grad():
        model.vae.quantize.embedding.weight.copy_(codes)


def heldout_tiles(heldout: Regions, config: DemoConfig) -> list[list[Tile]]:
    """Return the tiles that figures and pictures are made of, per magnification."""
    return [heldout.tiles(level, config.data.heldout_tiles, config.seed) for level in range(len(DEMO_SCALE.names))]


def measure_autoencoder(model: ZoomLDM, heldout: Regions, config: DemoConfig) -> dict[str, float]:
    """Return the held-out PSNR in dB per magnification; measured once, kept in the run folder."""
    path, weights = Path(config.run) / "psnr.json", Path(config.run) / "autoencoder.pt"
    if path.exists() and path.stat().st_mtime_ns > weights.stat().st_mtime_ns:
        return json.loads(path.read_text())
    figures = ae.heldout_psnr(
        model.vae, heldout, heldout_tiles(heldout, config), config.device, settled(config.bfloat16)
    )
    log.info("held-out PSNR (dB): %s", figures)
    save_json(path, figures)
    return figures
