"""TransMIL: two Nyström attention layers with a convolution over the squared sequence between them.

Source: Shao et al., "TransMIL", NeurIPS 2021; Xiong et al., "Nyströmformer", AAAI 2021. The sequence is folded into a
square in the order of the instances, so their order matters. Ours: each bag is processed by itself, at its own length,
so that padding cannot matter; landmarks are means of nearly equal segments, not zero-padded ones; the (N, landmarks)
matrices are never stored (scaled_dot_product_attention streams them), so memory grows with the sequence alone.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mil.models.contract import BagModel, BagOutput, ModelConfig, cross_entropy, embedding

HEADS = 8
LANDMARKS = 128
PINV_STEPS = 6
SHORTCUT = 33
"""Width of the depth-wise convolution over values that the Nyströmformer adds."""


def pseudo_inverse(a: Tensor) -> Tensor:
    """Return the Moore-Penrose inverse of row-stochastic matrices (..., m, m), by the paper's six iterations."""
    columns, rows = a.abs().sum(dim=-2).amax(dim=-1), a.abs().sum(dim=-1).amax(dim=-1)
    z = a.mT / (columns * rows)[..., None, None]
    eye = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)
    for _ in range(PINV_STEPS):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


class NystromAttention(nn.Module):
    """Attention of a sequence (1, n, H) through at most LANDMARKS segment means."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = HEADS
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.shortcut = nn.Conv2d(HEADS, HEADS, (SHORTCUT, 1), padding=(SHORTCUT // 2, 0), groups=HEADS, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v (1, heads, n, d) and the landmarks of q and k (1, heads, m, d); q is scaled."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = q * q.shape[-1] ** -0.5
        count = min(LANDMARKS, x.shape[1])
        return q, k, v, _segment_means(q, count), _segment_means(k, count)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, q_marks, k_marks = self._project(x)
        inner = pseudo_inverse(torch.softmax((q_marks @ k_marks.mT).float(), dim=-1))
        seen = F.scaled_dot_product_attention(q_marks, k, v, scale=1.0)
        mixed = F.scaled_dot_product_attention(q, k_marks, (inner @ seen.float()).to(q.dtype), scale=1.0)
        return x + self.out((mixed + self.shortcut(v)).transpose(1, 2).flatten(2))

    def first_row(self, x: Tensor) -> Tensor:
        """Return how much the first token attends to each, (n,), mean of heads; one head at a time in memory."""
        q, k, _, q_marks, k_marks = (t[0].float() for t in self._project(x))
        total = torch.zeros(x.shape[1], device=x.device)
        for head in range(self.heads):
            inner = pseudo_inverse(torch.softmax(q_marks[head] @ k_marks[head].mT, dim=-1))
            to_marks = torch.softmax(q[head, :1] @ k_marks[head].mT, dim=-1) @ inner
            total += (to_marks @ torch.softmax(q_marks[head] @ k[head].mT, dim=-1))[0]
        return total / self.heads


def _segment_means(x: Tensor, count: int) -> Tensor:
    """Return the means of `count` nearly equal segments: (1, heads, n, d) -> (1, heads, count, d)."""
    edges = torch.linspace(0, x.shape[2], count + 1, device=x.device).round().long()
    sizes = edges.diff()
    owner = torch.repeat_interleave(torch.arange(count, device=x.device), sizes)
    total = torch.zeros(*x.shape[:2], count, x.shape[3], device=x.device, dtype=x.dtype).index_add(2, owner, x)
    return total / sizes[:, None].to(x.dtype)


class PositionEncoding(nn.Module):
    """Depth-wise 7, 5 and 3 px convolutions over the square the sequence is folded into (the paper's PPEG)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in (7, 5, 3)])

    def forward(self, x: Tensor, side: int) -> Tensor:
        square = x[:, 1:].mT.unflatten(-1, (side, side))
        for convolution in self.convolutions:
            square = square + convolution(x[:, 1:].mT.unflatten(-1, (side, side)))
        return torch.cat([x[:, :1], square.flatten(2).mT], dim=1)


class TransMIL(BagModel):
    """The class token's answer; its attention in the last layer, where positive, is the instances' attention."""

    permutation_invariant: ClassVar[bool] = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        hidden = -(-config.hidden // HEADS) * HEADS
        self.embed = embedding(config.width, ModelConfig(config.name, config.widths, hidden, dropout=config.dropout))
        self.token = nn.Parameter(torch.randn(1, 1, hidden) * 0.02)
        self.first, self.last = NystromAttention(hidden, config.dropout), NystromAttention(hidden, config.dropout)
        self.position = PositionEncoding(hidden)
        self.norm, self.classify = nn.LayerNorm(hidden), nn.Linear(hidden, config.outputs)

    def _sequence(self, x: Tensor) -> Tensor:
        """Return the sequence before the last layer: x (n, D) -> (1, 1 + side², H)."""
        h = self.embed(self.features(x))[None]
        side = int(x.shape[0] ** 0.5)
        side += side * side < x.shape[0]
        h = torch.cat([self.token.to(h.dtype), h, h[:, : side * side - x.shape[0]]], dim=1)
        return self.position(self.first(h), side)

    def _logit(self, sequence: Tensor) -> Tensor:
        return self.classify(self.norm(self.last(sequence)[:, 0]))[0].squeeze(-1).float()

    def forward(self, x: Tensor, mask: Tensor) -> BagOutput:
        attention = torch.zeros(mask.shape, device=x.device)
        logits = []
        for number in range(len(x)):
            sequence = self._sequence(x[number][mask[number]])
            logits.append(self._logit(sequence))
            with torch.no_grad():
                count = int(mask[number].sum())
                row = self.last.first_row(sequence)[1 : 1 + count].clamp_min(0) + 1e-12
                attention[number, mask[number]] = row / row.sum()
        return BagOutput(torch.stack(logits), attention)

    def loss(self, x: Tensor, mask: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        logits = [self._logit(self._sequence(bag[here])) for bag, here in zip(x, mask, strict=True)]
        return cross_entropy(torch.stack(logits), y, weight)
