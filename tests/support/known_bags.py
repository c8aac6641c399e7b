"""Bags whose label and key instances are known by construction."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class KnownBags:
    """Bags, labels, and which instances carry the label."""

    bags: list[NDArray[np.float32]]
    labels: NDArray[np.int64]
    keys: list[NDArray[np.bool_]]


def key_instance_bags(count: int, seed: int, width: int = 8, share: float = 0.1) -> KnownBags:
    """Positive bags hold a share of instances of a kind that negative bags lack; those hold another rare kind."""
    rng = np.random.default_rng(seed)
    bags, labels, keys = [], np.arange(count) % 2, []
    for label in labels:
        instances = rng.normal(size=(int(rng.integers(30, 60)), width)).astype(np.float32)
        key = np.zeros(len(instances), bool)
        key[: max(2, int(share * len(instances)))] = True
        instances[key, 0] += 4 if label else 0
        instances[key, 1] += 0 if label else 4
        order = rng.permutation(len(instances))
        bags.append(instances[order])
        keys.append(key[order] & bool(label))
    return KnownBags(bags, labels, keys)


def two_scale_bags(count: int, seed: int, width: int = 6) -> KnownBags:
    """A bag is positive if its key instances carry a sign in the fine part AND in the coarse one.

    Negative bags carry one of the signs or none, so each part alone is limited by construction: its best AUROC is 5/6.
    """
    rng = np.random.default_rng(seed)
    bags, labels, keys = [], np.arange(count) % 2, []
    for label in labels:
        number = int(rng.integers(30, 50))
        fine, coarse = rng.normal(size=(2, number, width)).astype(np.float32)
        key = np.zeros(number, bool)
        key[:8] = True
        kind = (True, True) if label else [(True, False), (False, True), (False, False)][rng.integers(3)]
        fine[key, 0] += 3 if kind[0] else -3
        coarse[key, 0] += 3 if kind[1] else -3
        order = rng.permutation(number)
        bags.append(np.concatenate([fine, coarse], axis=1)[order])
        keys.append(key[order])
    return KnownBags(bags, labels, keys)
