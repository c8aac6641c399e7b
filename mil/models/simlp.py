"""SiMLP: the mean of a bag's instances and a perceptron with one hidden layer. No instance counts more than another.

Source: Li et al., "Can We Simplify Slide-level Fine-tuning of Pathology Foundation Models?", 2025 (arXiv 2502.20823).
Ours: the width, the dropout and the training are those of the other models.
"""

import torch
from torch import Tensor, nn

from mil.models.contract import BagModel, BagOutput, ModelConfig, embedding


class SiMLP(BagModel):
    """Its attention is the even share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embed = embedding(config.width, config)
        self.classify = nn.Linear(config.hidden, config.outputs)

    def forward(self, x: Tensor, mask: Tensor) -> BagOutput:
        share = mask / mask.sum(dim=1, keepdim=True)
        # Scaling is linear, so the mean is scaled: no second array of the bag's size.
        mean = torch.einsum("bn,bnd->bd", share, x)
        return BagOutput(self.classify(self.embed(self.features(mean))).squeeze(-1), share)
