"""Attention pooling in chunks of instances: exact, and in memory bounded by one chunk, forwards and backwards.

A softmax over all instances is that over chunks of the softmax within each, weighted by the chunks' log-sum-exp. Longer
bags than one chunk are recomputed chunk by chunk in the backward pass (checkpointing), so no (N, hidden) is ever kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mil.models.contract import MASKED

CHUNK = 8192
"""Instances per chunk: 8 MiB of float32 at 256 wide."""
Embed = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(B, n, D) -> values (B, n, H), scores (B, n)."""


class GatedAttention(nn.Module):
    """Score of an instance: w(tanh(V h) * sigmoid(U h)). Source: Ilse, Tomczak, Welling 2018, equation 9."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.value, self.gate, self.score = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, n, H) -> (B, n)."""
        return self.score(torch.tanh(self.value(h)) * torch.sigmoid(self.gate(h))).squeeze(-1)


def attend(embed: Embed, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pool x (B, N, D) where mask (B, N): return z (B, H) and the scores (B, N), MASKED on padding."""

    def part(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, scores = embed(x)
        scores = scores.float().masked_fill(~mask, MASKED)
        weights = torch.softmax(scores, dim=1)
        pooled = torch.einsum("bn,bnh->bh", weights, values.float())
        return pooled, torch.logsumexp(scores, dim=1), scores

    parts = chunked(part, x, mask)
    if len(parts) == 1:
        return parts[0][0], parts[0][2]
    pooled = torch.stack([p[0] for p in parts], dim=1)
    share = torch.softmax(torch.stack([p[1] for p in parts], dim=1), dim=1)
    return torch.einsum("bc,bch->bh", share, pooled), torch.cat([p[2] for p in parts], dim=1)


def chunked(part: Callable[..., tuple[Tensor, ...]], x: Tensor, mask: Tensor) -> list[tuple[Tensor, ...]]:
    """Apply `part` to chunks of instances; recompute it in the backward pass when there is more than one."""
    count = x.shape[1]
    if count <= CHUNK:
        return [part(x, mask)]
    pieces = [(x[:, at : at + CHUNK], mask[:, at : at + CHUNK]) for at in range(0, count, CHUNK)]
    if not torch.is_grad_enabled():
        return [part(*piece) for piece in pieces]
    return [checkpoint(part, *piece, use_reentrant=False) for piece in pieces]  # type: ignore[misc]
