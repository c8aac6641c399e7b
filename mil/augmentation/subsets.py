"""A fraction of a fold's training patients: nested, by class, the same for all arms.

Invariant: a smaller fraction's patients are a part of a larger one's, training in training and validation in
validation; test patients are always all. It does not know bags or arms.
"""

from collections.abc import Mapping

import numpy as np

from mil.data.cohort import Cohort
from mil.data.splits import Fold
from mil.errors import SplitError


def subset(fold: Fold, cohort: Cohort, fraction: float, classes: tuple[str, ...], seed: int) -> Fold:
    """Return the fold with a share of the patients it trains and validates on; 1 returns it as it is.

    Each class keeps its share, rounded, and at least one patient of validation. Raises: SplitError for a class that is
    left without a patient to train on.
    """
    if fraction == 1:
        return fold
    labels = cohort.labels
    kept: dict[str, set[str]] = {"train": set(), "validation": set()}
    for label, name in enumerate(classes):
        for part, chosen in kept.items():
            there = sorted(p for p in fold.part(part) if labels[p] == label)
            order = np.random.default_rng((seed, fold.repeat, fold.number, label, len(part))).permutation(len(there))
            count = round(fraction * len(there))
            if part == "train" and not count:
                raise SplitError(
                    f"a fraction must leave a patient of each class to train on; {fraction:g} of {len(there)} patients "
                    f"of {name} in {fold.name} leaves none. Use a larger fraction, fewer folds, or more patients."
                )
            chosen |= {there[i] for i in order[: max(1, count)]}
    return Fold(fold.repeat, fold.number, frozenset(kept["train"]), frozenset(kept["validation"]), fold.test)


def shares(fold: Fold, labels: Mapping[str, int], classes: tuple[str, ...]) -> dict[str, int]:
    """Return how many patients of each class a fold trains on."""
    return {name: sum(labels[p] == label for p in fold.train) for label, name in enumerate(classes)}
