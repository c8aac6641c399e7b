"""Two plain classifiers on vectors of tiles: logistic regression and a perceptron, both scikit-learn's.

Both see standardised vectors; the regression's strength and the perceptron's decay are chosen by the validation part,
which also calibrates and, of two classes, chooses the threshold. It does not know pictures or files.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mil.fit.calibration import called, choose_threshold, fit_calibration
from mil.fit.metrics import Predictions
from mil.tiles.pictures import Division

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""scikit-learn's C: inverse strength of the regression's penalty."""
DECAYS = (1e-4, 1e-2, 1.0)
"""scikit-learn's alpha of the perceptron."""
STEPS, BATCH = 4000, 200
"""Steps that the perceptron may take at least, where its loss still falls, and rows per step: few pictures make few
steps per epoch."""
LEAST = 1e-12
"""Probability below which log-odds are cut."""


def _regression(value: float, seed: int, hidden: int, rows: int) -> LogisticRegression:
    del hidden, rows
    return LogisticRegression(C=value, max_iter=2000, random_state=seed)


def _perceptron(value: float, seed: int, hidden: int, rows: int) -> MLPClassifier:
    epochs = max(50, STEPS // -(-rows // BATCH))
    size: Any = min(BATCH, rows)  # its stubs know the word auto alone
    return MLPClassifier((hidden,), alpha=value, batch_size=size, max_iter=epochs, random_state=seed)


PROBES: Mapping[str, tuple[Callable[[float, int, int, int], Any], Sequence[float]]] = {
    "logistic regression": (_regression, STRENGTHS),
    "MLP": (_perceptron, DECAYS),
}


def judge(
    name: str, vectors: NDArray[np.float32], labels: NDArray[np.int64], patients: NDArray, part: Division, seed: int,
    hidden: int,
) -> tuple[Predictions, dict[str, float]]:  # fmt: skip
    """Fit one of PROBES on a division; return what it says of the tested rows, and what was chosen."""
    make, values = PROBES[name]
    best: tuple[float, float, Pipeline] | None = None
    for value in values:
        model = make_pipeline(StandardScaler(), make(value, seed, hidden, len(part.train)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=ConvergenceWarning)  # the validation part judges the fit
            model.fit(vectors[part.train], labels[part.train])
        loss = float(log_loss(labels[part.validation], model.predict_proba(vectors[part.validation])))
        if best is None or loss < best[0]:
            best = loss, value, model
    assert best is not None
    _, value, model = best
    calibration = fit_calibration(_logits(model, vectors[part.validation]), labels[part.validation])
    said = calibration(_logits(model, vectors[part.validation]))
    threshold = choose_threshold(said, labels[part.validation]) if said.ndim == 1 else None
    tested = calibration(_logits(model, vectors[part.test]))
    found = Predictions(tuple(patients[part.test]), labels[part.test], tested, called(tested, threshold))
    return found, {"chosen": value, "validation_loss": best[0], "temperature": 1 / calibration.slope}


def _logits(model: Pipeline, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log-odds (n,), of more than two classes log-probabilities (n, classes)."""
    logs = np.log(np.maximum(model.predict_proba(vectors), LEAST))
    return logs[:, 1] - logs[:, 0] if logs.shape[1] == 2 else logs
