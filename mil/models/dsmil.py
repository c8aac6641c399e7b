"""DSMIL: a max over instances and an attention around the most positive one, averaged.

Source: Li, Li, Eliceiri, "Dual-stream multiple instance learning network", CVPR 2021; instances are embedded first.
"""

import math

import torch
from torch import Tensor, nn

from mil.models.contract import MASKED, BagModel, BagOutput, ModelConfig, embedding, weighted_bce
from mil.models.pooling import attend, chunked


class DSMIL(BagModel):
    """The critical instance is the one with the largest instance logit; padding can never be it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        hidden, attention = config.hidden, config.attention
        self.embed = embedding(config.width, config)
        self.instance = nn.Linear(hidden, 1)
        self.query = nn.Sequential(nn.Linear(hidden, attention), nn.ReLU(), nn.Linear(attention, attention), nn.Tanh())
        self.value = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(hidden, hidden), nn.ReLU())
        self.classify = nn.Linear(hidden, 1)

    def _streams(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest instance logit (B,), the bag logit (B,) and the scores (B, N)."""

        def judge(x: Tensor, mask: Tensor) -> tuple[Tensor]:
            return (self.instance(self.embed(self.features(x))).squeeze(-1).float().masked_fill(~mask, MASKED),)

        logits = torch.cat([part for (part,) in chunked(judge, x, mask)], dim=1)
        largest, at = logits.max(dim=1)
        critical = x[torch.arange(len(x), device=x.device), at]
        query = self.query(self.embed(self.features(critical)))

        def embed(x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.embed(self.features(x))
            return self.value(h), torch.einsum("bna,ba->bn", self.query(h), query) / math.sqrt(query.shape[-1])

        z, scores = attend(embed, x, mask)
        return largest, self.classify(z).squeeze(-1), scores

    def forward(self, x: Tensor, mask: Tensor) -> BagOutput:
        largest, bag, scores = self._streams(x, mask)
        return BagOutput((largest + bag.float()) / 2, torch.softmax(scores, dim=1))

    def loss(self, x: Tensor, mask: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        largest, bag, _ = self._streams(x, mask)
        return (weighted_bce(largest, y, weight) + weighted_bce(bag, y, weight)) / 2
