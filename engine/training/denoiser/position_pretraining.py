"""Teach fresh networks where the cells of a condition lie, before they learn to denoise.

At the demo's size they do not find out by themselves. Measured after 9000 steps: a linear map from a cell's SSL
vector explains 93 % of the variance of its mean latent, the network at t = 999 explained 40 % at 5x and 12 % at 2.5x
and 1.25x. The Summarizer's content drowned its position embedding, and the U-Net's only cue to position is the padding
of its convolutions. So the Summarizer first learns to tell place and content of every cell, the U-Net gets a path for
positions (pathway.py), and the cross-attention begins as a look-up of the pixel's own cell. The architecture stays the
published one; only the initial weights differ.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from engine.model.summarizer import CELL_TOKENS, GRID_SIDE, Summarizer
from engine.training.optimisation import TrainingError
from engine.training.settings import PlaceSettings

_FREQUENCIES = 2
CODE_DIM = 4 * _FREQUENCIES
"""Numbers in the code of a place."""
_PEAK = 10.0
"""Attention logit of a pixel on its own cell at the start; the next of 8 cells on an axis gets about two less."""


def place_codes(h: int, w: int) -> Tensor:
    """Return the codes `(h·w, CODE_DIM)` of a grid's places, row by row.

    Waves of half and whole periods over each axis: the inner product of two codes depends on the distance alone.
    """

    def waves(n: int) -> Tensor:
        angle = ((torch.arange(n) + 0.5) / n - 0.5)[:, None] * torch.arange(1, _FREQUENCIES + 1) * torch.pi
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    y, x = waves(h)[:, None].expand(h, w, -1), waves(w)[None].expand(h, w, -1)
    return torch.cat([y, x], dim=2).flatten(0, 1)


def cell_shape(grid: Tensor) -> tuple[int, int]:
    """Return how many cells of a raw grid `(D, h, w)` the Summarizer sees on each axis."""
    return min(GRID_SIDE, grid.shape[1]), min(GRID_SIDE, grid.shape[2])


def first_token(h: int, w: int) -> int:
    """Return the token of a grid's first cell; token 0 is the magnification."""
    return 1 + CELL_TOKENS // 2 - h * w // 2


@torch.no_grad()
def seat_cells(conditioner: Summarizer) -> None:
    """Write the codes of the 8×8, 4×4 and 2×2 grids into the position embedding, each into channels of its own."""
    embedding = conditioner.encoder.pos_embedding
    for number, side in enumerate((8, 4, 2)):
        start, channels = first_token(side, side), slice(number * CODE_DIM, (number + 1) * CODE_DIM)
        embedding[0, start : start + side * side, channels] += 2 * place_codes(side, side).to(embedding)


class TokenReaders(nn.Module):
    """What a cell's token `(C,)` must tell linearly: its place, and its latents averaged over 2×2 squares."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.place = nn.Linear(width, CODE_DIM, bias=False)
        self.content = nn.Linear(width, 12)

    def forward(self, tokens: Tensor, x0: Tensor, h: int, w: int) -> Tensor:
        """Return the squared error for one tile: tokens `(h·w, C)`, latents `(3, 64, 64)`."""
        squares = F.adaptive_avg_pool2d(x0, (2 * h, 2 * w)).view(3, h, 2, w, 2)
        content = squares.permute(1, 3, 0, 2, 4).reshape(h * w, 12)
        place = place_codes(h, w).to(tokens)
        return F.mse_loss(self.place(tokens), place) + F.mse_loss(self.content(tokens), content)


def token_loss(readers: TokenReaders, context: Tensor, grids: list[Tensor], x0: Tensor) -> Tensor:
    """Return the mean error of the readers on a batch: context `(B, 65, C)`, raw grids, latents `(B, 3, 64, 64)`."""
    total = context.new_zeros(())
    for tokens, grid, latents in zip(context, grids, x0, strict=True):
        h, w = cell_shape(grid)
        start = first_token(h, w)
        total = total + readers(tokens[start : start + h * w], latents, h, w)
    return total / len(grids)


def descend(
    parameters: list[nn.Parameter], loss_of: Callable[[int], Tensor], steps: int, lr: float,
    masks: dict[nn.Parameter, Tensor] | None = None,
) -> float:  # fmt: skip
    """Take `steps` of Adam with a linear decay and return the last loss; a mask says which entries may move."""
    optimiser = torch.optim.Adam(parameters, lr=lr)
    last = float("nan")
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - 0.95 * step / steps)
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        for parameter, mask in (masks or {}).items():
            if parameter.grad is not None:
                parameter.grad *= mask
        optimiser.step()
        last = float(loss.detach())
    return last


def look_up_sites(unet: Any) -> dict[str, Any]:
    """Return the cross-attentions that can know their place: from the coarsest level on, through the upward path."""
    deepest = f"down_blocks.{len(unet.down_blocks) - 1}."
    return {
        name: module
        for name, module in unet.named_modules()
        if name.endswith("attn2")
        and isinstance(module, Attention)
        and name.startswith(("mid_block.", "up_blocks.", deepest))
    }


@torch.no_grad()
def install_look_up(sites: dict[str, Any], queries: dict[str, nn.Linear], key: nn.Linear) -> None:
    """Let each pixel's query and each token's key be the codes of their places.

    queries: per site, the reader of the last channels of what the site gets; key: the reader of a token.
    """
    for name, site in sites.items():
        if site.heads != 1:
            raise TrainingError(
                f"places need attention with one head; {name} has {site.heads}. Set places.token_steps and "
                "places.path_steps to 0."
            )
        amplitude = (_PEAK / (2 * _FREQUENCIES * site.scale)) ** 0.5
        reader = queries[name].weight
        site.to_q.weight[:CODE_DIM] = 0
        site.to_q.weight[:CODE_DIM, -reader.shape[1] :] = reader * amplitude
        site.to_k.weight[:CODE_DIM] = key.weight * amplitude


class AttentionWatch:
    """Hears the logits of the sites' cross-attention while `listening`, thread by thread; else changes nothing."""

    def __init__(self, unet: nn.Module) -> None:
        self._thread = local()
        for site in look_up_sites(unet).values():
            site.set_processor(_WatchedAttention(self))

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Yield the list that fills with logits `(B, pixels, tokens)`, one entry per site."""
        self._thread.heard = []
        try:
            yield self._thread.heard
        finally:
            self._thread.heard = None

    def hear(self, logits: Tensor) -> None:
        """Keep one site's logits if this thread listens."""
        if getattr(self._thread, "heard", None) is not None:
            self._thread.heard.append(logits)


class _WatchedAttention:
    """Cross-attention with one head whose logits can be heard."""

    def __init__(self, watch: AttentionWatch) -> None:
        self._watch = watch

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> Tensor:
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        logits = (query @ key.transpose(1, 2)).float() * attn.scale
        self._watch.hear(logits)
        mixed = logits.softmax(dim=-1).to(query.dtype) @ attn.to_v(encoder_hidden_states)
        return attn.to_out[1](attn.to_out[0](mixed))


def look_up_losses(heard: list[Tensor], grids: list[Tensor], dropped: Tensor) -> Tensor:
    """Return each sample's cross-entropy `(B,)` between a pixel's attention and its own cell; 0 where dropped."""
    total = heard[0].new_zeros(len(grids))
    for logits in heard:
        side = round(logits.shape[1] ** 0.5)
        wanted = torch.stack([_own_tokens(*cell_shape(grid), side) for grid in grids]).to(logits.device)
        entropy = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        total = total + entropy.mean(dim=1) * ~dropped
    return total / len(heard)


def look_up_share(settings: PlaceSettings, step: int) -> float:
    """Return the weight of the look-up loss at a step."""
    return settings.look_up_weight * max(0.0, 1 - step / max(1, settings.look_up_steps))


def _own_tokens(h: int, w: int, side: int) -> Tensor:
    """Return the token of the cell under each of side×side pixels, row by row."""
    row, column = torch.arange(side) * h // side, torch.arange(side) * w // side
    return (first_token(h, w) + row[:, None] * w + column).flatten()
