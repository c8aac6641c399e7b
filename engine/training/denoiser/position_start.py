"""Where a denoiser starts from when not from another model: knowing where cells lie.

It does not know the training that follows. places.py says why, pathway.py how.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.model.summarizer import Summarizer
from engine.model.zoomldm import ZoomLDM
from engine.training.batches import DenoiserPart
from engine.training.checkpoints import load_checkpoint, save_checkpoint
from engine.training.denoiser.loss import DenoiserNetworks, noise_shares, noisy_latents
from engine.training.denoiser.position_channels import Pathway
from engine.training.denoiser.position_pretraining import (
    TokenReaders,
    descend,
    install_look_up,
    look_up_sites,
    seat_cells,
    token_loss,
)
from engine.training.optimisation import TrainingError, check_keys
from engine.training.settings import PlaceSettings

log = logging.getLogger(__name__)

_UNET_TILES = 2
"""The U-Net's path sees so many of a step's patches: what it learns depends on none of them."""
_TOKENS, _PATH = 1, 2
"""Added to the seed: the two parts draw different patches."""

PatchesOf = Callable[[int, int], DenoiserPart]
"""What a step learns from, for (seed, step)."""


def start_with_places(
    model: ZoomLDM, patches: PatchesOf, settings: PlaceSettings, seed: int, path: Path, dtype: torch.dtype,
    keys: dict[str, Any], writes: bool = True,
) -> None:  # fmt: skip
    """Teach a fresh Summarizer and U-Net where cells lie; kept in `path`, so that a killed run does it once.

    keys: what decides the outcome. Every worker of a group learns the same; one of them `writes`.

    Raises: TrainingError for a conditioner without places, and for a `path` with other keys.
    """
    networks = DenoiserNetworks(model)
    if path.exists():
        state = load_checkpoint(path)
        check_keys(path, state.get("keys", {}), keys)
        networks.load_state_dict(state["module"])
        return
    if not isinstance(model.conditioner, Summarizer):
        raise TrainingError(
            f"places are those of a Summarizer's cells; model.conditioner is {model.config.conditioner.kind!r}. Set "
            "places.token_steps and places.path_steps to 0."
        )
    readers = TokenReaders(model.config.conditioner.output_dim).to(model.device)
    seat_cells(model.conditioner)

    def tokens(step: int) -> Tensor:
        part = patches(seed + _TOKENS, step)
        cells = [cell.to(model.device) for cell in part.cells]
        return token_loss(readers, model.conditioner(cells, part.levels), cells, part.x0.to(model.device))

    def noisy(step: int) -> tuple[Tensor, Tensor]:
        part = patches(seed + _PATH, step)
        x0, noise, times = (v[:_UNET_TILES].to(model.device) for v in (part.x0, part.noise, part.times))
        return noisy_latents(noise_shares(model.alphas_cumprod.to(x0.device), times), x0, noise), times

    last = descend([*model.conditioner.parameters(), *readers.parameters()], tokens, settings.token_steps, lr=3e-3)
    log.info("tokens: place and content read with a squared error of %.3f", last)
    path_of_places = Pathway(model.unet, seed)
    queries = path_of_places.learn(noisy, model.null_context(_UNET_TILES), settings.path_steps, dtype)
    install_look_up(look_up_sites(model.unet), queries, readers.place)
    if writes:
        save_checkpoint(path, {"module": networks.state_dict(), "keys": keys})
