"""How well probabilities tell two classes apart, and how sure that is: weighted figures and intervals over patients.

All figures take weights, one per patient and resample, because a bootstrap resample is nothing but counts; so thousands
of resamples are a few array operations. Held against scikit-learn's figures by tests. It does not know models or files.
Sources: Efron & Tibshirani 1993 (percentile intervals); Davison & Hinkley 1997 (p-value of a paired difference).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
_AT_ONCE = 256
"""Resamples evaluated together: 256 x 10 000 patients in float64 are 20 MB."""


@dataclass(frozen=True)
class Predictions:
    """What was said about each patient when nobody of it had been seen in training, one row per patient."""

    patients: tuple[str, ...]
    labels: NDArray[np.int64]
    """(n,): 0 or 1."""
    probability: Floats
    """(n,): calibrated, 0..1."""
    called: NDArray[np.bool_]
    """(n,): at or above the threshold that was chosen on validation data."""


def auroc(labels: NDArray, score: Floats, weights: Floats) -> Floats:
    """Return the area under the ROC curve: labels, score (n,), weights (r, n) -> (r,); NaN for one class."""
    order = np.argsort(score, kind="stable")
    y, w = labels[order].astype(bool), weights[:, order]
    _, group = np.unique(score[order], return_inverse=True)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    positive = np.add.reduceat(w * y, starts, axis=1)
    negative = np.add.reduceat(w * ~y, starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=1)
    return _ratio(wins, positive.sum(axis=1) * negative.sum(axis=1))


def auprc(labels: NDArray, score: Floats, weights: Floats) -> Floats:
    """Return the average precision: labels, score (n,), weights (r, n) -> (r,)."""
    order = np.argsort(-score, kind="stable")
    y, w = labels[order].astype(bool), weights[:, order]
    starts = np.flatnonzero(np.diff(-score[order], prepend=-np.inf) != 0)
    positive, every = (np.add.reduceat(v, starts, axis=1) for v in (w * y, w))
    hits, seen = np.cumsum(positive, axis=1), np.cumsum(every, axis=1)
    precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    return _ratio((positive * precision).sum(axis=1), hits[:, -1])


def balanced_accuracy(labels: NDArray, called: NDArray[np.bool_], weights: Floats) -> Floats:
    """Return the mean of sensitivity and specificity: labels, called (n,), weights (r, n) -> (r,)."""
    y = labels.astype(bool)
    sensitivity = _ratio((weights * (y & called)).sum(axis=1), (weights * y).sum(axis=1))
    specificity = _ratio((weights * (~y & ~called)).sum(axis=1), (weights * ~y).sum(axis=1))
    return (sensitivity + specificity) / 2


def brier(labels: NDArray, probability: Floats, weights: Floats) -> Floats:
    """Return the mean squared error of the probability: labels, probability (n,), weights (r, n) -> (r,)."""
    return _ratio((weights * (probability - labels) ** 2).sum(axis=1), weights.sum(axis=1))


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


Figure = Callable[[Predictions, Floats], Floats]
FIGURES: Mapping[str, Figure] = {
    "auroc": lambda p, w: auroc(p.labels, p.probability, w),
    "auprc": lambda p, w: auprc(p.labels, p.probability, w),
    "balanced_accuracy": lambda p, w: balanced_accuracy(p.labels, p.called, w),
    "brier": lambda p, w: brier(p.labels, p.probability, w),
}


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def resamples(count: int, seed: int, number: int = RESAMPLES) -> Floats:
    """Return how often each of `count` patients is drawn, (number, count); the same for the same arguments."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=number)
    return drawn.astype(np.float64)


def spread(figure: Figure, repeats: Mapping[int, Predictions], weights: Floats) -> Floats:
    """Return the figure under each row of weights, mean over repeats, (r,).

    Weights count patients, named by the first repeat; a patient that is drawn is drawn in all repeats.
    """
    patients = {p: i for i, p in enumerate(patients_of(repeats))}
    values = []
    for found in repeats.values():
        columns = [patients[p] for p in found.patients]
        parts = range(0, len(weights), _AT_ONCE)
        values.append(np.concatenate([figure(found, weights[at : at + _AT_ONCE][:, columns]) for at in parts]))
    return np.mean(values, axis=0)


def patients_of(repeats: Mapping[int, Predictions]) -> list[str]:
    """Return all patients of all repeats, in a fixed order."""
    return sorted({patient for found in repeats.values() for patient in found.patients})


def interval(figure: Figure, repeats: Mapping[int, Predictions], seed: int, number: int = RESAMPLES) -> Interval:
    """Return a figure, mean over repeats, with its 95 % percentile interval by bootstrap over patients."""
    count = len(patients_of(repeats))
    value = float(spread(figure, repeats, np.ones((1, count)))[0])
    drawn = spread(figure, repeats, resamples(count, seed, number))
    drawn = drawn[np.isfinite(drawn)]  # a resample of one class has no AUROC
    if not len(drawn):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def difference(
    figure: Figure, one: Mapping[int, Predictions], other: Mapping[int, Predictions], seed: int, number: int = RESAMPLES
) -> tuple[Interval, float]:
    """Return one minus other with its interval, and the two-sided p-value: the same patients are drawn for both."""
    count = len(patients_of(one))
    value = float((spread(figure, one, np.ones((1, count))) - spread(figure, other, np.ones((1, count))))[0])
    weights = resamples(count, seed, number)
    drawn = spread(figure, one, weights) - spread(figure, other, weights)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Interval(value, float(low), float(high)), float(min(1.0, 2 * (tail + 1) / (len(drawn) + 1)))


def confusion(found: Predictions) -> dict[str, int]:
    """Count patients by truth and call."""
    y, called = found.labels.astype(bool), found.called
    return {
        "true_positive": int((y & called).sum()),
        "false_negative": int((y & ~called).sum()),
        "false_positive": int((~y & called).sum()),
        "true_negative": int((~y & ~called).sum()),
    }
