"""More than two classes: figures are scikit-learn's, a study has one probability per class, and faults are named."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from engine.core.runtime import one_by_one
from mil import heatmap as heatmap_command
from mil import predict as predict_command
from mil.data.cohort import Cohort, Slide, read_labels
from mil.data.splits import check_division, divide
from mil.data.tasks import SplitScheme, Task, load_task
from mil.errors import CohortError, SplitError, TaskError
from mil.fit.calibration import fit_calibration
from mil.fit.classifier import MILClassifier
from mil.fit.metrics import FIGURES, Predictions, auroc, confusion_matrix, interval, resamples
from mil.fit.store import load_models
from mil.folds.folds import read_predictions
from mil.report.comparison import compare, contenders
from mil.study import prepare, run
from tests.support.known_cohort import KnownCohort
from tests.support.known_grades import GRADES, TASK, write_grades
from tests.support.known_study import config_of


def predictions(count: int = 90, classes: int = 3, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    score = np.exp(1.2 * np.eye(classes)[labels] + rng.normal(size=(count, classes)))
    score /= score.sum(axis=1, keepdims=True)
    return Predictions(tuple(f"p{i:03d}" for i in range(count)), labels, score, score.argmax(axis=1))


def test_figures_are_scikit_learns() -> None:
    found, weights = predictions(), resamples(90, 1, 4)
    truth = np.eye(3)[found.labels]
    for i, w in enumerate(weights):
        expected = {
            "auroc": roc_auc_score(found.labels, found.probability, multi_class="ovr", sample_weight=w),
            "auprc": average_precision_score(truth, found.probability, average="macro", sample_weight=w),
            "balanced_accuracy": balanced_accuracy_score(found.labels, found.called, sample_weight=w),
            "brier": np.average(((found.probability - truth) ** 2).sum(axis=1), weights=w),
        }
        for name, value in expected.items():
            assert FIGURES[name](found, weights)[i] == pytest.approx(value, abs=1e-12), name


def test_one_of_two_against_the_rest() -> None:
    three = predictions()
    one = Predictions(three.patients, three.labels % 2, three.probability[:, 1], three.probability[:, 1] > 0.4)
    rest, weights = one.against_the_rest(0), np.ones((1, 90))
    assert auroc(rest.labels, rest.probability, weights) == pytest.approx(auroc(one.labels, one.probability, weights))
    assert (rest.called != one.called).all()


def test_intervals_and_the_confusion_of_all() -> None:
    found = predictions()
    area = interval(FIGURES["auroc"], {0: found}, 0, 200)
    assert area.low < area.value < area.high
    table = confusion_matrix(found)
    assert table.sum(axis=1).tolist() == [30, 30, 30]
    assert np.trace(table) == (found.called == found.labels).sum()


def test_a_temperature_undoes_a_distortion() -> None:
    rng = np.random.default_rng(0)
    logit = 2 * rng.normal(size=(6000, 3))
    p = np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True)
    labels = (rng.random((6000, 1)) > np.cumsum(p, axis=1)).sum(axis=1)
    assert fit_calibration(5 * logit, labels).slope * 5 == pytest.approx(1, abs=0.08)


def test_the_estimator_tells_names_apart() -> None:
    rng = np.random.default_rng(0)
    y = np.array(["ductal", "lobular", "other"])[np.arange(36) % 3]
    bags = [rng.normal(size=(6, 4)).astype(np.float32) + 4 * np.eye(4, dtype=np.float32)[i % 3] for i in range(36)]
    model = MILClassifier(hidden=8, attention=4, epochs=15, lr=0.01, dropout=0.0, device="cpu").fit(bags, y)
    probability = model.predict_proba(bags)
    assert probability.shape == (36, 3)
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    assert (model.predict(bags) == y).mean() > 0.9
    (seen,) = model.class_maps(bags[:1])
    assert seen.shape == (6, 3)
    assert seen.mean(axis=0).argmax() == 0


@pytest.fixture(scope="module")
def grades(tmp_path_factory: pytest.TempPathFactory) -> tuple[KnownCohort, Path]:
    return write_grades(tmp_path_factory.mktemp("grades"))


@pytest.fixture(scope="module")
def graded(grades: tuple[KnownCohort, Path]) -> Path:
    known, task = grades
    folder = known.features.parent / "run"
    return run(prepare(config_of(known, folder, task=str(task), simlp=True)), one_by_one, print)


def test_a_study_of_three(graded: Path) -> None:
    results = json.loads((graded / "metrics.json").read_text())
    assert results["cohort"]["classes"] == dict.fromkeys(GRADES, 10)
    assert results["pooled"]["model"]["auroc"]["value"] > 0.85
    assert set(results["pooled"]) == {"model", "baseline", "simlp"}
    assert np.sum(results["confusion"]) == 30
    assert set(results["per_class"]["model"]) == set(GRADES)
    assert results["cohort"]["left_out"] == [["G900", "of none of the classes: grade is 'unheard of'"]]
    page = (graded / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "called mid grade" in page
    assert "SiMLP" in page


def test_each_class_has_its_probability(graded: Path, grades: tuple[KnownCohort, Path], tmp_path: Path) -> None:
    tested = read_predictions(graded / "folds" / "repeat0_fold0")
    assert tested.probability.shape == (15, 3)
    np.testing.assert_array_equal(tested.called, tested.probability.argmax(axis=1))
    out = tmp_path / "p.csv"
    assert predict_command.main([str(graded), f"--features={grades[0].features}", f"--out={out}", "--device=cpu"]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 31
    told = [[float(row[f"probability_{name}"]) for name in GRADES] for row in rows]
    np.testing.assert_allclose(np.sum(told, axis=1), 1, atol=1e-5)
    assert [row["call"] for row in rows] == [GRADES[i] for i in np.argmax(told, axis=1)]
    assert load_models(graded, "cpu")[0].classifier.model_.config.classes == 3


def test_a_heatmap_for_each_class(graded: Path, tmp_path: Path, grades: tuple[KnownCohort, Path]) -> None:
    argv = [str(graded), "--slide=G002", f"--out={tmp_path / 'm'}", "--max_px=200"]
    assert heatmap_command.main(argv) == 0
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"m.png", "m_0-low.png", "m_1-mid-grade.png", "m_2-high.png"}
    assert len({Image.open(path).tobytes() for path in tmp_path.glob("m_*.png")}) == 3
    told = [f["properties"]["measurements"] for f in json.loads((tmp_path / "m.geojson").read_text())["features"]]
    for one in told[:3]:
        assert sum(one[f"probability {name}"] for name in GRADES) == pytest.approx(1, abs=1e-3)
    new = [str(graded), "--slide=G900", f"--features={grades[0].features}", f"--out={tmp_path / 'n'}", "--device=cpu"]
    assert heatmap_command.main(new) == 0
    with h5py.File(next(graded.glob("folds/*/attention.h5"))) as file:
        assert next(iter(file.values()))["probability"].shape[1] == 3


def test_studies_of_three_are_compared(graded: Path) -> None:
    result = compare(contenders([graded]), 0, 100)
    assert result.patients == 30
    assert len(result.pairs) == 1


def test_pooled_vectors_take_the_place_of_coarse_ones(grades: tuple[KnownCohort, Path], tmp_path: Path) -> None:
    """The coarse sign is in the 5x vectors alone, so without them the third class cannot be told from the second."""
    known, task = grades
    folder = run(prepare(config_of(known, tmp_path / "r", task=str(task), coarse="pooled")), one_by_one, print)
    told = json.loads((folder / "metrics.json").read_text())["per_class"]["model"]
    assert told["low"]["auroc"]["value"] > 0.9
    assert told["high"]["auroc"]["value"] < 0.9
    saved = load_models(folder, "cpu")[0]
    array = saved.bag(known.features / "G001.h5")[0].read()
    assert array.shape[1] == 10
    np.testing.assert_allclose(array[:16, 5:].mean(axis=0), array[:, 5:][0], atol=1e-5)
    np.testing.assert_allclose(array[:16, :5].mean(axis=0), array[0, 5:], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TASK.replace("classes: [low, mid grade, high]", "classes: [low, high]"), "classes must be different names"),
        (TASK.replace("mid grade, high]\nm", "low, high]\nm"), "classes must be different names"),
        (TASK + "positive: grade == high\n", "neither or both"),
        (TASK + "negative: grade == low\n", "goes with `positive`"),
        (re.sub("each.*", "", TASK), "neither or both"),
    ],
)
def test_tasks_that_contradict_themselves(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(TaskError, match=told):
        load_task(str(tmp_path / "t.yaml"))


def task_of(*rules: str) -> Task:
    return Task("t", each=rules, classes=("a", "b", "c"))


def test_a_row_of_two_classes_is_refused() -> None:
    with pytest.raises(TaskError, match="line 2 is of `g > 1` and `g > 2`"):
        task_of("g < 1", "g > 1", "g > 2").label({"g": "3"}, "line 2")
    assert task_of("g == 0", "g == 1", "g == 2").label({"g": "2.0"}, "") == 2


def test_a_class_without_patients(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("patient,slide,g\np1,s1,0\np2,s2,1\n")
    with pytest.raises(CohortError, match=r"all classes.*got only: a, b"):
        read_labels(path, task_of("g == 0", "g == 1", "g == 2"))


def test_a_class_with_one_patient() -> None:
    slides = [Slide(f"s{n}", f"p{n}", n % 2 if n else 2) for n in range(30)]
    with pytest.raises(SplitError, match="1 of class 2"):
        divide(Cohort(tuple(slides)), SplitScheme(folds=2), 0)


def test_parts_have_all_classes() -> None:
    slides = tuple(Slide(f"s{n}", f"p{n}", n % 3) for n in range(30))
    folds = divide(Cohort(slides), SplitScheme(folds=2), 0)
    some = {p for p in folds[0].validation if int(p[1:]) % 3 != 1}
    with pytest.raises(SplitError, match="all classes; validation of repeat0_fold0 has 2 of 3"):
        check_division(Cohort(slides), [replace(folds[0], validation=frozenset(some))], SplitScheme(folds=2))
