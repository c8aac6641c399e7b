"""MILClassifier is a scikit-learn estimator, repeats itself to the byte, and finds what bags were built of."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold, cross_val_score

from engine.training.optimisation import TrainingError
from mil.errors import CohortError, SplitError
from mil.fit.baseline import MeanPoolClassifier
from mil.fit.classifier import MILClassifier
from mil.fit.metrics import FIGURES, Predictions, interval
from mil.fit.training import TrainingConfig
from mil.models import MODELS
from tests.support.known_bags import KnownBags, key_instance_bags, two_scale_bags

SMALL = {"hidden": 16, "attention": 8, "lr": 1e-2, "device": "cpu", "dropout": 0.0, "batch_size": 8}


@pytest.fixture(scope="module")
def known() -> KnownBags:
    return key_instance_bags(48, seed=0)


@pytest.fixture(scope="module")
def fitted(known: KnownBags) -> MILClassifier:
    return MILClassifier(**SMALL, epochs=12).fit(known.bags, known.labels)


def test_it_separates_and_finds_the_key_instances(fitted: MILClassifier) -> None:
    test = key_instance_bags(40, seed=1)
    probability = fitted.predict_proba(test.bags)
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    assert roc_auc_score(test.labels, probability[:, 1]) >= 0.95
    assert (fitted.predict(test.bags) == test.labels).mean() >= 0.85
    maps = list(fitted.attention_maps(test.bags))
    areas = [roc_auc_score(k, a) for k, a, y in zip(test.keys, maps, test.labels, strict=True) if y]
    assert np.mean(areas) >= 0.8


def test_fusion_beats_each_scale() -> None:
    train, test = two_scale_bags(96, seed=0), two_scale_bags(150, seed=1)
    areas = {}
    for name, columns in (("both", slice(0, 12)), ("fine", slice(0, 6)), ("coarse", slice(6, 12))):
        model = MILClassifier(**SMALL, epochs=14).fit([b[:, columns] for b in train.bags], train.labels)
        areas[name] = roc_auc_score(test.labels, model.decision_function([b[:, columns] for b in test.bags]))
    branches = MILClassifier("abmil_branches", widths=(6, 6), **SMALL, epochs=14).fit(train.bags, train.labels)
    areas["branches"] = roc_auc_score(test.labels, branches.decision_function(test.bags))
    assert min(areas["both"], areas["branches"]) > 0.97
    assert max(areas["fine"], areas["coarse"]) < 0.94


def test_whitening_finds_a_faint_direction() -> None:
    """The label is in the difference of two features that are otherwise nearly the same."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    bags = []
    for label in labels:
        shared, own = rng.normal(size=(2, 30, 6)).astype(np.float32)
        shared += rng.normal(size=6)  # a bag has a level of its own
        own[:, 0] += 1.5 * label
        bags.append(np.concatenate([shared, shared + 0.2 * own], axis=1))
    areas = {}
    for scaling in ("standardize", "whiten"):
        model = MILClassifier(**SMALL, epochs=6, scaling=scaling).fit(bags[:80], labels[:80])
        areas[scaling] = roc_auc_score(labels[80:], model.decision_function(bags[80:]))
    assert areas["whiten"] > 0.95
    assert areas["standardize"] < 0.8


def test_shuffled_labels_teach_nothing(known: KnownBags) -> None:
    labels = np.random.default_rng(2).permutation(known.labels)
    logits = np.zeros(len(labels))
    for train, test in StratifiedKFold(3, shuffle=True, random_state=0).split(labels, labels):
        model = MILClassifier(**SMALL, epochs=4).fit([known.bags[i] for i in train], labels[train])
        logits[test] = model.predict_proba([known.bags[i] for i in test])[:, 1]
    found = Predictions(tuple(f"p{i:02d}" for i in range(len(labels))), labels, logits, logits > 0.5)
    area = interval(FIGURES["auroc"], {0: found}, seed=0)
    assert area.low < 0.5 < area.high


def test_two_equal_runs_are_equal(known: KnownBags, fitted: MILClassifier) -> None:
    torch.rand(3)  # what others draw does not matter
    again = clone(fitted).fit(known.bags, known.labels)
    assert again.history_ == fitted.history_
    for name, value in fitted.model_.state_dict().items():
        assert torch.equal(again.model_.state_dict()[name], value), name
    assert again.calibration_ == fitted.calibration_
    other = clone(fitted).set_params(seed=1).fit(known.bags, known.labels)
    assert other.history_ != fitted.history_
    assert not torch.are_deterministic_algorithms_enabled()


def test_it_is_an_estimator(known: KnownBags) -> None:
    model = MILClassifier(**SMALL, epochs=2)
    assert clone(model).get_params() == model.get_params()
    names = np.array(["no", "yes"])[known.labels]
    groups = np.arange(48) // 4 * 2 + known.labels  # two bags of each patient
    scores = cross_val_score(
        model,
        known.bags,
        names,
        groups=groups,
        cv=StratifiedGroupKFold(2),
        scoring="roc_auc",
        params={"groups": groups},
    )
    assert scores.shape == (2,)
    search = GridSearchCV(model, {"attention": [4, 8]}, cv=2, scoring="roc_auc").fit(known.bags, names)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert set(search.predict(known.bags[:5])) <= {"no", "yes"}


def test_parameters_are_those_of_the_training_section() -> None:
    params = MILClassifier().get_params()
    assert {name: params[name] for name in TrainingConfig.__dataclass_fields__} == vars(TrainingConfig())


def test_patients_are_kept_whole_in_the_inner_split(known: KnownBags) -> None:
    groups = np.repeat(np.arange(24), 2)
    labels = np.repeat(np.arange(24) % 2, 2)
    model = MILClassifier(seed=3)
    train, validation = model._set_apart(model._part(known.bags, labels, groups))
    assert not set(train.groups) & set(validation.groups)
    assert len(train.bags) + len(validation.bags) == 48


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_trains(known: KnownBags, name: str) -> None:
    widths = (4, 4) if name == "abmil_branches" else None
    model = MILClassifier(name, widths=widths, **SMALL, epochs=2, instances=20).fit(known.bags[:16], known.labels[:16])
    assert np.isfinite(model.predict_proba(known.bags[16:20])).all()


def test_mixed_precision_stays_close(known: KnownBags, fitted: MILClassifier) -> None:
    half = clone(fitted).set_params(precision="bfloat16").fit(known.bags, known.labels)
    difference = half.predict_proba(known.bags)[:, 1] - fitted.predict_proba(known.bags)[:, 1]
    assert np.abs(difference).mean() < 0.1


def test_training_stops_early(known: KnownBags) -> None:
    model = MILClassifier(**SMALL, epochs=40, patience=2).fit(known.bags, known.labels)
    assert len(model.history_) < 40
    best = max(model.history_, key=lambda r: (r.validation_auroc, -r.validation_loss))
    assert len(model.history_) - 1 - best.epoch == 2


def test_the_rate_ends_low(fitted: MILClassifier) -> None:
    rates = [record.lr for record in fitted.history_]
    assert rates[-1] < 0.05 * max(rates)


def test_a_diverging_run_is_an_error(known: KnownBags) -> None:
    bags = [b * np.float32(1e30) for b in known.bags[:16]]
    with pytest.raises(TrainingError, match=r"training\.lr"):
        MILClassifier(**{**SMALL, "lr": 1e30}, scaling="none", epochs=3).fit(bags, known.labels[:16])


@pytest.mark.parametrize(
    ("labels", "groups", "error"),
    [([1] * 8, None, CohortError), ([0, 1, 2] + [0, 1] * 2 + [0], None, SplitError), ([0] * 7, None, CohortError),
     ([0, 1] * 4, [0, 1] * 4, SplitError), ([0, 1] * 4, [0, 0, 1, 1, 2, 2, 3, 3], CohortError)],
)  # fmt: skip
def test_labels_that_cannot_be_learnt(known: KnownBags, labels: list[int], groups: object, error: type) -> None:
    with pytest.raises(error):
        MILClassifier(**SMALL).fit(known.bags[:8], labels, groups)  # type: ignore[arg-type]


def test_bags_of_another_width_are_refused(fitted: MILClassifier) -> None:
    with pytest.raises(CohortError, match="8 wide"):
        fitted.predict([np.zeros((3, 5), np.float32)])


def test_the_baseline(known: KnownBags) -> None:
    model = MeanPoolClassifier().fit(known.bags, known.labels)
    test = key_instance_bags(40, seed=1)
    assert roc_auc_score(test.labels, model.predict_proba(test.bags)[:, 1]) > 0.8
    assert set(model.predict(test.bags)) == {0, 1}


def test_the_baseline_finds_a_faint_direction_when_it_whitens() -> None:
    """Two features that hide their difference under what they share: whitening makes the difference count."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    shared, noise = rng.standard_normal((60, 1, 1)) + rng.standard_normal((60, 50, 1)), rng.standard_normal((60, 50, 1))
    sign = 0.08 * (labels[:, None, None] * 2 - 1) + 0.08 * noise
    bags = list(np.concatenate([shared + sign, shared - sign], axis=2).astype(np.float32))

    def area(**settings: str) -> float:
        model = MeanPoolClassifier(**settings).fit(bags[:40], labels[:40])
        return float(roc_auc_score(labels[40:], model.decision_function(bags[40:])))

    assert area(scaling="whiten") > 0.95
    assert area() < 0.75
