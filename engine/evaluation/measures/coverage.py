"""How two sets of vectors lie among each other: precision, recall, density, coverage, and the nearest of a third set.

Invariant: float64, and distances a block of rows at a time, so that memory grows with the rows and not with their
square. It does not know encoders or pictures. Source: Kynkäänniemi et al. 2019 (precision, recall); Naeem et al. 2020
(density, coverage).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from engine.evaluation.measures.distances import Vectors

_ROWS = 512
"""Rows whose distances to all others are held at once."""


@dataclass(frozen=True)
class Coverage:
    """How the generated vectors lie among the real ones, k neighbours each."""

    precision: float
    """Share of the generated within the k-neighbour ball of some real one: does not see what is missing."""
    recall: float
    """Share of the real within the ball of some generated one: one wild generated vector has a ball for many."""
    density: float
    """How many real balls a generated one lies in, over k; 1 is expected, more means crowded where the real are."""
    coverage: float
    """Share of the real whose ball holds a generated one."""


def coverage_of(generated: Vectors, real: Vectors, k: int = 5) -> Coverage:
    """Return precision, recall, density and coverage.

    Raises: ValueError unless both sets have more than k rows.
    """
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    if min(len(generated), len(real)) <= k:
        raise ValueError(
            f"{k} neighbours need more than {k} vectors in each set; got {len(generated)} and {len(real)}. Take more "
            "crops, or fewer neighbours."
        )
    of_real, of_generated = kth_distance(real, k), kth_distance(generated, k)
    balls, inside, covered = 0, np.zeros(len(generated), bool), np.zeros(len(real), bool)
    recalled = np.zeros(len(real), bool)
    for first in range(0, len(generated), _ROWS):
        rows = slice(first, first + _ROWS)
        apart = cdist(generated[rows], real)
        within = apart <= of_real
        balls += int(within.sum())
        inside[rows] = within.any(axis=1)
        covered |= within.any(axis=0)
        recalled |= (apart <= of_generated[rows, None]).any(axis=0)
    return Coverage(float(inside.mean()), float(recalled.mean()), balls / (k * len(generated)), float(covered.mean()))


def kth_distance(vectors: Vectors, k: int) -> NDArray[np.float64]:
    """Return the distance of each row to its k-th nearest other row."""
    found = np.empty(len(vectors))
    for first in range(0, len(vectors), _ROWS):
        rows = slice(first, first + _ROWS)
        found[rows] = np.partition(cdist(vectors[rows], vectors), k, axis=1)[:, k]  # 0 is the row itself
    return found


def nearest(vectors: Vectors, training: Vectors) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return for each row the distance to the nearest row of `training`, and which one. Raises ValueError if none."""
    if not len(training) or training.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"the training set must have vectors of width {vectors.shape[1]}; got {training.shape}. Use one encoder."
        )
    vectors, training = np.asarray(vectors, np.float64), np.asarray(training, np.float64)
    apart, which = np.empty(len(vectors)), np.empty(len(vectors), np.int64)
    for first in range(0, len(vectors), _ROWS):
        rows = slice(first, first + _ROWS)
        distances = cdist(vectors[rows], training)
        which[rows] = distances.argmin(axis=1)
        apart[rows] = distances.min(axis=1)
    return apart, which


@dataclass(frozen=True)
class Memorisation:
    """Distances of generated and held-out vectors to the nearest training vector."""

    generated_median: float
    held_out_median: float
    ratio: float
    """Medians' ratio; well below 1 the generated lie nearer to the training set than unseen real pictures do."""
    copied_share: float
    """Share of the generated that lie nearer than 99 % of the held-out ones do; 0.01 is expected."""
    closest: int
    """Row of the generated vector that is nearest to a training one."""
    closest_training: int
    """Its row in the training set."""


def memorisation(generated: Vectors, held_out: Vectors, training: Vectors) -> Memorisation:
    """Compare distances to the nearest training vector. Raises ValueError for empty sets or other widths."""
    (own, which), (other, _) = nearest(generated, training), nearest(held_out, training)
    limit = float(np.percentile(other, 1))
    median, beside = float(np.median(own)), float(np.median(other))
    first = int(own.argmin())
    # Equal medians of zero are equal: both sets lie in the training set.
    ratio = median / beside if beside else (1.0 if not median else float("inf"))
    return Memorisation(median, beside, ratio, float((own < limit).mean()), first, int(which[first]))
