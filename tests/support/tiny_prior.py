"""A random text prior for the tiny model: 16 channels, windows of two cells, seven words."""

import torch

from engine.model.text.prior import TextPrior, TextPriorConfig
from engine.model.text.words import WordTowerConfig

WORDS = WordTowerConfig(("%", ",", "20", "fat", "much", "no", "stroma"), width=16, heads=2)


def tiny_prior(ssl_dim: int = 16, window: int = 2) -> TextPrior:
    config = TextPriorConfig(
        ssl_dim=ssl_dim, encoder="unknown", text_dim=16, window=window, width=16, layers=2, heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = TextPrior(config, WORDS)
        for value in made.parameters():  # a new prior says the mean of everything
            torch.nn.init.normal_(value, std=0.2)
    return made.eval()
