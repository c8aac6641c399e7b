"""The embedded prior keeps kinds of tissue apart: "only A, no B" is A, which figures over percents did not show."""

import itertools

import numpy as np
import pytest
import torch

from engine.model.text.prior import TextPrior
from engine.model.text.sampler import TextRegions, sample_grid
from engine.model.text.towers import load_tower
from engine.model.text.weights import load_prior
from engine.model.zoomldm import ZoomLDM

KINDS = ("fat", "stroma", "nests")


@pytest.fixture(scope="module")
def prior() -> TextPrior:
    return load_prior("demo", None, None, ZoomLDM.from_pretrained("demo").config)


def look(prior: TextPrior, text: str) -> np.ndarray:
    """Return the mean standardised vector of a grid of 2 × 2 cells, as the demo draws, at length 1."""
    with torch.no_grad():
        told = prior.read(*load_tower("words", prior).encode([text]))
    grid = prior.standard(sample_grid(prior, TextRegions(told, np.ones((1, 2, 2), np.float32)), 20, 2.0, 0)[None])
    mean = grid.mean(dim=(0, 2, 3)).numpy()
    return mean / np.linalg.norm(mean)


def test_only_one_kind_without_another_is_that_kind(prior: TextPrior) -> None:
    mostly = {kind: look(prior, f"mostly {kind}") for kind in KINDS}
    for kind, other in itertools.permutations(KINDS, 2):
        found = look(prior, f"only {kind}, no {other}")
        near = {name: float(found @ vector) for name, vector in mostly.items()}
        assert max(near, key=lambda name: near[name]) == kind, (kind, other, near)
