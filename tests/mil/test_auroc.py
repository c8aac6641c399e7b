"""Figures are scikit-learn's, intervals cover what they should, and calibration keeps the order."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, brier_score_loss, roc_auc_score

from mil.fit.calibration import choose_threshold, fit_calibration
from mil.fit.metrics import FIGURES, Predictions, auprc, auroc, confusion, difference, interval, resamples


def predictions(count: int = 80, seed: int = 0, signal: float = 1.0, ties: bool = True) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    score = 1 / (1 + np.exp(-(signal * labels + rng.normal(size=count) - signal / 2)))
    score = score.round(1) if ties else score
    return Predictions(tuple(f"p{i:03d}" for i in range(count)), labels, score, score >= 0.5)


@pytest.mark.parametrize("ties", [True, False])
def test_figures_are_scikit_learns(ties: bool) -> None:
    found, weights = predictions(ties=ties), resamples(80, 1, 5)
    y, p = found.labels, found.probability
    for i, w in enumerate(weights):
        expected = {
            "auroc": roc_auc_score(y, p, sample_weight=w),
            "auprc": average_precision_score(y, p, sample_weight=w),
            "balanced_accuracy": balanced_accuracy_score(y, found.called, sample_weight=w),
            "brier": brier_score_loss(y, p, sample_weight=w),
        }
        for name, value in expected.items():
            assert FIGURES[name](found, weights)[i] == pytest.approx(value, abs=1e-12), name


def test_one_class_has_no_area() -> None:
    assert np.isnan(auroc(np.ones(3, int), np.arange(3.0), np.ones((1, 3)))).all()
    assert np.isnan(auprc(np.zeros(3, int), np.arange(3.0), np.ones((1, 3)))).all()


def test_intervals_cover_the_truth() -> None:
    truth = auroc(*(lambda p: (p.labels, p.probability))(predictions(20_000, 99, ties=False)), np.ones((1, 20_000)))[0]
    found = [interval(FIGURES["auroc"], {0: predictions(80, s, ties=False)}, 0, 300) for s in range(60)]
    assert np.mean([i.low <= truth <= i.high for i in found]) >= 0.85
    assert all(i.low <= i.value <= i.high for i in found)


def test_patients_are_drawn_in_all_repeats_together() -> None:
    one = predictions()
    order = np.random.default_rng(5).permutation(80)
    shuffled = Predictions(
        tuple(one.patients[i] for i in order), one.labels[order], one.probability[order], one.called[order]
    )
    alone, twice = (interval(FIGURES["auroc"], r, 0, 200) for r in ({0: one}, {0: one, 1: shuffled}))
    assert (alone.value, alone.low, alone.high) == pytest.approx((twice.value, twice.low, twice.high))


def test_differences() -> None:
    weak, strong = {0: predictions(120, 1, 0.5)}, {0: predictions(120, 2, 3.0)}
    delta, p_value = difference(FIGURES["auroc"], strong, weak, 0)
    assert delta.low > 0
    assert p_value < 0.01
    same, p_same = difference(FIGURES["auroc"], weak, weak, 0)
    assert (same.value, same.low, same.high, p_same) == (0, 0, 0, 1)
    back, p_back = difference(FIGURES["auroc"], weak, strong, 0)
    assert back.value == pytest.approx(-delta.value)
    assert p_back == p_value


def test_confusion_counts_everybody() -> None:
    found = predictions()
    table = confusion(found)
    assert sum(table.values()) == 80
    assert table["true_positive"] + table["false_negative"] == 40


def test_calibration_undoes_a_distortion() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(size=5000) * 2
    labels = rng.random(5000) < 1 / (1 + np.exp(-logit))
    fitted = fit_calibration(4 * logit + 3, labels)
    assert (fitted.slope * 4, fitted.offset + 3 * fitted.slope) == (
        pytest.approx(1, abs=0.1),
        pytest.approx(0, abs=0.1),
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_calibration_stays_finite_and_keeps_the_order(sign: int) -> None:
    logit = np.array([-3.0, -2, -1, 1, 2, 3])
    fitted = fit_calibration(sign * logit, np.array([0, 0, 0, 1, 1, 1]))
    p = fitted(np.sort(logit))
    assert (np.diff(p) > 0).all()
    assert 0 < p.min() < p.max() < 1


def test_the_threshold_divides_best() -> None:
    p = np.array([0.1, 0.2, 0.3, 0.7, 0.8])
    assert choose_threshold(p, np.array([0, 0, 0, 1, 1])) == pytest.approx(0.5)
    assert choose_threshold(p, np.array([0, 1, 0, 1, 1])) == pytest.approx(0.5)  # 0.15 is as good, and further from 0.5
    assert 0 < choose_threshold(np.array([0.4, 0.4]), np.array([0, 1])) < 1
