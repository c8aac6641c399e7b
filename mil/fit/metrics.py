"""How well probabilities tell classes apart, and how sure that is: weighted figures and intervals over patients.

All figures take weights, one per patient and resample, because a bootstrap resample is nothing but counts; so thousands
of resamples are a few array operations. Held against scikit-learn's figures by tests. It does not know models or files.
Of more than two classes, AUROC and average precision are means over the classes, each against the rest (scikit-learn's
`multi_class="ovr"`, macro).
Sources: Efron & Tibshirani 1993 (percentile intervals); Davison & Hinkley 1997 (p-value of a paired difference).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

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
    """(n,): numbers of the classes."""
    probability: Floats
    """Calibrated, 0..1: of two classes (n,), that of the second; of more (n, classes)."""
    called: NDArray[Any]
    """(n,): of two classes, whether at or above the threshold that was chosen on validation data; of more, the number
    of the likeliest class."""

    @property
    def classes(self) -> int:
        return 2 if self.probability.ndim == 1 else self.probability.shape[1]

    def only(self, patients: Collection[str]) -> "Predictions":
        """Return the rows of some patients."""
        kept = np.isin(np.array(self.patients, object), list(patients))
        names = tuple(name for name, keep in zip(self.patients, kept, strict=True) if keep)
        return Predictions(names, self.labels[kept], self.probability[kept], self.called[kept])

    def against_the_rest(self, label: int) -> "Predictions":
        """Return one class against all others, as two classes."""
        if self.classes == 2:
            probability = self.probability if label else 1 - self.probability
            return Predictions(self.patients, (self.labels == label).astype(int), probability, self.called == label)
        truth = (self.labels == label).astype(int)
        return Predictions(self.patients, truth, self.probability[:, label], self.called == label)


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


def recall(labels: NDArray, called: NDArray, weights: Floats) -> Floats:
    """Return the share of the true ones that are called so: labels, called (n,), weights (r, n) -> (r,)."""
    y = labels.astype(bool)
    return _ratio((weights * (y & called)).sum(axis=1), (weights * y).sum(axis=1))


def balanced_accuracy(found: Predictions, weights: Floats) -> Floats:
    """Return the mean recall of all classes: weights (r, n) -> (r,)."""
    if found.classes == 2:
        y, called = found.labels.astype(bool), found.called.astype(bool)
        return (recall(y, called, weights) + recall(~y, ~called, weights)) / 2
    return _mean_over_classes(lambda one, w: recall(one.labels, one.called, w), found, weights)


def brier(labels: NDArray, probability: Floats, weights: Floats) -> Floats:
    """Return the mean squared error of the probability: labels (n,), weights (r, n) -> (r,).

    Of two classes, probability (n,), it lies in 0..1; of more, (n, classes), it is summed over them and lies in 0..2.
    """
    if probability.ndim == 1:
        error = (probability - labels) ** 2
    else:
        error = ((probability - np.eye(probability.shape[1])[labels]) ** 2).sum(axis=1)
    return _ratio((weights * error).sum(axis=1), weights.sum(axis=1))


def _mean_over_classes(figure: "Figure", found: Predictions, weights: Floats) -> Floats:
    """Return the mean of each class against the rest; NaN where a class is missing."""
    return np.mean([figure(found.against_the_rest(label), weights) for label in range(found.classes)], axis=0)


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


Figure = Callable[[Predictions, Floats], Floats]


def _of_two(figure: Callable[[NDArray, Floats, Floats], Floats]) -> Figure:
    """Return a figure of two classes as one of any number: the mean over classes."""

    def of_any(found: Predictions, weights: Floats) -> Floats:
        if found.classes == 2:
            return figure(found.labels, found.probability, weights)
        return _mean_over_classes(lambda one, w: figure(one.labels, one.probability, w), found, weights)

    return of_any


FIGURES: Mapping[str, Figure] = {
    "auroc": _of_two(auroc),
    "auprc": _of_two(auprc),
    "balanced_accuracy": balanced_accuracy,
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
    drawn = drawn[np.isfinite(drawn)]  # a resample without a class has no AUROC
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
    if not len(drawn):
        return Interval(value, float("nan"), float("nan")), float("nan")
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Interval(value, float(low), float(high)), float(min(1.0, 2 * (tail + 1) / (len(drawn) + 1)))


def confusion_matrix(found: Predictions) -> NDArray[np.int64]:
    """Count patients by truth (rows) and call (columns): (classes, classes)."""
    table = np.zeros((found.classes, found.classes), np.int64)
    np.add.at(table, (found.labels.astype(int), found.called.astype(int)), 1)
    return table


def confusion(found: Predictions) -> dict[str, int]:
    """Count patients of two classes by truth and call."""
    y, called = found.labels.astype(bool), found.called.astype(bool)
    return {
        "true_positive": int((y & called).sum()),
        "false_negative": int((y & ~called).sum()),
        "false_positive": int((~y & called).sum()),
        "true_negative": int((~y & ~called).sum()),
    }
