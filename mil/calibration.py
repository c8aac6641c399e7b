"""From logits to probabilities and a threshold, on validation patients only.

Source: Platt 1999 with his smoothed targets, which keep the fit finite when the classes separate. The slope stays
positive, so that calibration never turns the order of patients over; without any information it only flattens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit

SLOPES = (0.05, 10.0)


@dataclass(frozen=True)
class Calibration:
    """probability = 1 / (1 + exp(-(slope · logit + offset)))"""

    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, logit: NDArray[np.floating]) -> NDArray[np.float64]:
        return expit(self.slope * np.asarray(logit, dtype=np.float64) + self.offset)


def fit_calibration(logit: NDArray[np.floating], labels: NDArray) -> Calibration:
    """Fit slope and offset: logit, labels (n,); both classes must be there."""
    y = np.asarray(labels).astype(bool)
    target = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))
    logit = np.asarray(logit, dtype=np.float64)

    def loss(theta: NDArray[np.float64]) -> float:
        z = np.exp(theta[0]) * logit + theta[1]
        return float(-(target * log_expit(z) + (1 - target) * log_expit(-z)).mean())

    bounds = [tuple(np.log(SLOPES)), (None, None)]
    found = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=bounds)
    return Calibration(float(np.exp(found.x[0])), float(found.x[1]))


def choose_threshold(probability: NDArray[np.float64], labels: NDArray) -> float:
    """Return the threshold of best balanced accuracy, half-way between neighbours; of equals, the one nearest 0.5."""
    y = np.asarray(labels).astype(bool)
    values = np.unique(probability)
    candidates = np.concatenate([[values[0] / 2], (values[1:] + values[:-1]) / 2, [(1 + values[-1]) / 2]])
    called = probability[None] >= candidates[:, None]
    score = (called & y).sum(axis=1) / y.sum() + (~called & ~y).sum(axis=1) / (~y).sum()
    best = candidates[score >= score.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])
