"""From logits to probabilities and, of two classes, a threshold, on validation patients only.

Source: Platt 1999 with his smoothed targets, which keep the fit finite when the classes separate. The slope stays
positive, so that calibration never turns the order of patients over; without any information it only flattens. Of more
than two classes, one temperature is fitted (Guo et al. 2017), with targets smoothed alike, and the likeliest class is
called.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax, softmax

SLOPES = (0.05, 10.0)


@dataclass(frozen=True)
class Calibration:
    """Of two classes 1 / (1 + exp(-(slope · logit + offset))), of more softmax(slope · logits)."""

    slope: float = 1.0
    """Of more than two classes, one over the temperature."""
    offset: float = 0.0

    def __call__(self, logit: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return probabilities: of the second of two classes (n,) -> (n,), or (n, classes) -> (n, classes)."""
        if np.ndim(logit) > 1:
            return softmax(self.slope * np.asarray(logit, dtype=np.float64), axis=1)
        return expit(self.slope * np.asarray(logit, dtype=np.float64) + self.offset)


def fit_calibration(logit: NDArray[np.floating], labels: NDArray) -> Calibration:
    """Fit slope and offset, or one temperature: logit (n,) or (n, classes), labels (n,); all classes must be there."""
    if np.ndim(logit) > 1:
        return _fit_temperature(np.asarray(logit, dtype=np.float64), np.asarray(labels))
    y = np.asarray(labels).astype(bool)
    target = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))
    logit = np.asarray(logit, dtype=np.float64)

    def loss(theta: NDArray[np.float64]) -> float:
        z = np.exp(theta[0]) * logit + theta[1]
        return float(-(target * log_expit(z) + (1 - target) * log_expit(-z)).mean())

    bounds = [tuple(np.log(SLOPES)), (None, None)]
    found = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=bounds)
    return Calibration(float(np.exp(found.x[0])), float(found.x[1]))


def _fit_temperature(logit: NDArray[np.float64], labels: NDArray) -> Calibration:
    count = logit.shape[1]
    own = np.bincount(labels, minlength=count)[labels]
    # Platt's targets, for any number of classes: one patient more of each class.
    target = np.where(labels[:, None] == np.arange(count), own[:, None] + 1, 1) / (own[:, None] + count)

    def loss(theta: NDArray[np.float64]) -> float:
        return float(-(target * log_softmax(np.exp(theta[0]) * logit, axis=1)).sum(axis=1).mean())

    found = minimize(loss, np.zeros(1), method="L-BFGS-B", bounds=[tuple(np.log(SLOPES))])
    return Calibration(float(np.exp(found.x[0])))


def choose_threshold(probability: NDArray[np.float64], labels: NDArray) -> float:
    """Return the threshold of best balanced accuracy, half-way between neighbours; of equals, the one nearest 0.5."""
    y = np.asarray(labels).astype(bool)
    values = np.unique(probability)
    candidates = np.concatenate([[values[0] / 2], (values[1:] + values[:-1]) / 2, [(1 + values[-1]) / 2]])
    called = probability[None] >= candidates[:, None]
    score = (called & y).sum(axis=1) / y.sum() + (~called & ~y).sum(axis=1) / (~y).sum()
    best = candidates[score >= score.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def all_columns(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return probabilities (n, classes): as they are, or of two classes from (n,)."""
    return probability if probability.ndim > 1 else np.stack([1 - probability, probability], axis=1)


def called(probability: NDArray[np.float64], threshold: float | None) -> NDArray[np.int64]:
    """Return the number of the class that is called: (n,) at the threshold, (n, classes) the likeliest."""
    if threshold is None:
        return probability.argmax(axis=1)
    return (probability >= threshold).astype(np.int64)
