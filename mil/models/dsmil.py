"""DSMIL: a max over instances and an attention around the most positive one, averaged; of more classes, one each.

Source: Li, Li, Eliceiri, "Dual-stream multiple instance learning network", CVPR 2021; instances are embedded first,
and the attention returned is the mean of the classes'.
"""

import math

import torch
from torch import Tensor, nn

from mil.models.contract import MASKED, BagModel, BagOutput, ModelConfig, cross_entropy, embedding
from mil.models.pooling import attend, chunked


class DSMIL(BagModel):
    """The critical instance is the one with the largest instance logit; padding can never be it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        hidden, attention = config.hidden, config.attention
        self.embed = embedding(config.width, config)
        self.instance = nn.Linear(hidden, config.outputs)
        self.query = nn.Sequential(nn.Linear(hidden, attention), nn.ReLU(), nn.Linear(attention, attention), nn.Tanh())
        self.value = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(hidden, hidden), nn.ReLU())
        self.classify = nn.Linear(hidden * config.outputs, config.outputs)

    def _streams(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest instance logits (B, outputs), the bag logits (B, outputs) and the attention (B, N)."""

        def judge(x: Tensor, mask: Tensor) -> tuple[Tensor]:
            return (self.instance(self.embed(self.features(x))).float().masked_fill(~mask[..., None], MASKED),)

        logits = torch.cat([part for (part,) in chunked(judge, x, mask)], dim=1)
        largest, at = logits.max(dim=1)
        pooled, attention = zip(*(self._around(x, mask, rows) for rows in at.T), strict=True)
        mean = attention[0] if len(attention) == 1 else torch.stack(attention).mean(dim=0)
        return largest, self.classify(torch.cat(pooled, dim=-1)), mean

    def _around(self, x: Tensor, mask: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Pool around one class's critical instances, rows `at` (B,): return z (B, H) and the attention (B, N)."""
        critical = x[torch.arange(len(x), device=x.device), at]
        query = self.query(self.embed(self.features(critical)))

        def embed(x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.embed(self.features(x))
            return self.value(h), torch.einsum("bna,ba->bn", self.query(h), query) / math.sqrt(query.shape[-1])

        z, scores = attend(embed, x, mask)
        return z, torch.softmax(scores, dim=1)

    def forward(self, x: Tensor, mask: Tensor) -> BagOutput:
        largest, bag, attention = self._streams(x, mask)
        return BagOutput(((largest + bag.float()) / 2).squeeze(-1), attention)

    def loss(self, x: Tensor, mask: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        largest, bag, _ = self._streams(x, mask)
        parts = [cross_entropy(logit.squeeze(-1), y, weight) for logit in (largest, bag)]
        return (parts[0] + parts[1]) / 2
