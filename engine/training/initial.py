"""Where the denoiser starts from when not from random weights: another model, or knowing where cells lie.

It does not know the training that follows.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.model.summarizer import Summarizer
from engine.model.zoomldm import ZoomLDM
from engine.training.checkpointing import load_checkpoint, save_checkpoint
from engine.training.denoiser import DenoiserNetworks, LatentTiles, draw_batch, noisy_latents
from engine.training.pathway import Pathway
from engine.training.places import TokenReaders, descend, install_look_up, look_up_sites, seat_cells, token_loss
from engine.training.settings import DenoiserSettings, TrainingConfig

log = logging.getLogger(__name__)


@torch.no_grad()
def start_from_model(model: ZoomLDM, source: str) -> None:
    """Copy autoencoder, U-Net and Summarizer of another model (a folder or Hub id) of the same sizes into `model`.

    Where the other one predicts another quantity, the output layer starts at zero instead: v = 0 is the right mean.
    Raises: CheckpointError when it cannot be had; RuntimeError naming the keys when sizes differ.
    """
    other = ZoomLDM.from_pretrained(source)
    model.vae.load_state_dict(other.vae.state_dict())
    model.unet.load_state_dict(other.unet.state_dict())
    model.conditioner.load_state_dict(other.conditioner.state_dict())
    if other.config.prediction_type != model.config.prediction_type:
        start_at_zero(model.unet.conv_out)


def start_with_places(model: ZoomLDM, data: LatentTiles, config: TrainingConfig) -> None:
    """Teach a fresh Summarizer and U-Net where cells lie; kept in places.pt, so that a killed run does it once."""
    settings, path = config.places, Path(config.run) / "places.pt"
    networks = DenoiserNetworks(model)
    if path.exists():
        networks.load_state_dict(load_checkpoint(path)["module"])
        return
    if not isinstance(model.conditioner, Summarizer):
        raise TypeError("only a Summarizer's tokens have places; set places.token_steps and places.path_steps to 0.")
    count = len(config.train.magnification_weights)
    drawn = DenoiserSettings(batch_size=settings.batch_size, magnification_weights=(1.0,) * count, drop_condition=0.0)
    readers = TokenReaders(model.config.conditioner.output_dim).to(config.device)
    seat_cells(model.conditioner)

    def tokens(step: int) -> Tensor:
        batch = draw_batch(data, drawn, config.seed + 1, step, config.device)
        return token_loss(readers, model.summarize(batch.grids, batch.magnifications), batch.grids, batch.x0)

    def noisy(step: int) -> tuple[Tensor, Tensor]:
        batch = draw_batch(data, drawn, config.seed + 2, step, config.device).share(0, settings.batch_size // 2)
        return noisy_latents(model, batch), batch.times

    last = descend([*model.conditioner.parameters(), *readers.parameters()], tokens, settings.token_steps, lr=3e-3)
    log.info("tokens: place and content read with a squared error of %.3f", last)
    path_of_places = Pathway(model.unet, config.seed)
    queries = path_of_places.learn(noisy, model.null_context(2), settings.path_steps, config.bfloat16)
    install_look_up(look_up_sites(model.unet), queries, readers.place)
    save_checkpoint(path, {"module": networks.state_dict()})


@torch.no_grad()
def start_at_zero(layer: nn.Conv2d) -> None:
    """Set a layer to zero, as diffusion networks' output layers start."""
    layer.weight.zero_()
    if layer.bias is not None:
        layer.bias.zero_()
