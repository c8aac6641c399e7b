"""ABMIL with gated attention, for one joined bag, and with a branch per scale.

Source: Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", ICML 2018.
"""

import torch
from torch import Tensor, nn

from mil.models.contract import BagModel, BagOutput, ModelConfig, embedding
from mil.models.pooling import GatedAttention, attend


class ABMIL(BagModel):
    """Gated attention over embedded instances, then one linear layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embed = embedding(config.width, config)
        self.attend = GatedAttention(config.hidden, config.attention)
        self.classify = nn.Linear(config.hidden, config.outputs)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(self.features(x))
        return h, self.attend(h)

    def forward(self, x: Tensor, mask: Tensor) -> BagOutput:
        z, scores = attend(self._embed, x, mask)
        return BagOutput(self.classify(z).squeeze(-1), torch.softmax(scores, dim=1))


class BranchedABMIL(BagModel):
    """One embedding and one attention per scale, each over its own part of the instances; then one linear layer.

    A coarse vector counts once per fine tile inside it, so a coarse tile weighs as much as the tissue it holds. The
    attention returned is the mean of the branches'.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embed = nn.ModuleList([embedding(width, config) for width in config.widths])
        self.attend = nn.ModuleList([GatedAttention(config.hidden, config.attention) for _ in config.widths])
        self.classify = nn.Linear(config.hidden * len(config.widths), config.outputs)

    def _branch(self, number: int, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        start = sum(self.config.widths[:number])
        columns = slice(start, start + self.config.widths[number])

        def embed(x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.embed[number](self.features(x)[..., columns])
            return h, self.attend[number](h)

        return attend(embed, x, mask)

    def forward(self, x: Tensor, mask: Tensor) -> BagOutput:
        branches = [self._branch(number, x, mask) for number in range(len(self.config.widths))]
        z = torch.cat([pooled for pooled, _ in branches], dim=-1)
        attention = torch.stack([torch.softmax(scores, dim=1) for _, scores in branches]).mean(dim=0)
        return BagOutput(self.classify(z).squeeze(-1), attention)
