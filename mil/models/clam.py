"""CLAM with a single attention branch: ABMIL, plus a clustering loss on the most and least attended instances.

Source: Lu et al., "Data-efficient and weakly supervised computational pathology", Nature BME 2021.
Ours: classes are mutually exclusive (the paper's subtyping form), the clustering loss is a cross-entropy instead
of the smooth SVM, and no instance is taken as both most and least attended, which in tiny bags would contradict itself.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mil.models.abmil import ABMIL
from mil.models.contract import ModelConfig, cross_entropy
from mil.models.pooling import attend

INSTANCES = 8
"""The paper's B: instances taken at each end."""
BAG_SHARE = 0.7
"""Weight of the bag's loss; the clustering has the rest."""


class CLAMSB(ABMIL):
    """ABMIL whose embedding is also asked which instances speak for the bag's class."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.cluster = nn.ModuleList([nn.Linear(config.hidden, 1) for _ in range(config.classes)])

    def loss(self, x: Tensor, mask: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        z, scores = attend(self._embed, x, mask)
        bag = cross_entropy(self.classify(z).squeeze(-1), y, weight)
        bags = [self._clustering(x[i][mask[i]], scores[i][mask[i]], int(y[i])) for i in range(len(x))]
        return BAG_SHARE * bag + (1 - BAG_SHARE) * (torch.stack(bags) * weight).mean()

    def _clustering(self, x: Tensor, scores: Tensor, label: int) -> Tensor:
        """Ask the label's classifier for the most against the least attended, the others' to deny the most attended."""
        count = min(INSTANCES, max(1, len(x) // 2))
        order = scores.detach().argsort(descending=True, stable=True)
        most, least = order[:count], order[max(count, len(x) - count) :]
        h = self.embed(self.features(x[torch.cat([most, least])]))
        wanted = torch.zeros(len(h), device=x.device)
        wanted[: len(most)] = 1
        inside = F.binary_cross_entropy_with_logits(self.cluster[label](h).squeeze(-1).float(), wanted)
        others = [judge for kind, judge in enumerate(self.cluster) if kind != label]
        denied = torch.stack([judge(h[: len(most)]).squeeze(-1).float() for judge in others])
        return inside + F.binary_cross_entropy_with_logits(denied, torch.zeros_like(denied))
