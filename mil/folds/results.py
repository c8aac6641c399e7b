"""The figures of a study: per fold and pooled, with intervals over patients; the content of metrics.json.

It reads what folds wrote and computes nothing but figures. The pooled figure of a repeat takes every patient once, from
the fold that tested it; with several repeats it is their mean, and a patient is resampled in all of them together.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mil.data.cohort import Cohort
from mil.data.splits import PARTS, Fold
from mil.data.tasks import Task
from mil.fit.metrics import (
    FIGURES,
    RESAMPLES,
    Figure,
    Predictions,
    confusion,
    confusion_matrix,
    difference,
    interval,
    recall,
)
from mil.fit.store import fold_folders, read_record
from mil.folds.folds import BASELINE, MODEL, SIMLP, joined, read_predictions


def pooled(folder: Path, who: str = MODEL) -> dict[int, Predictions]:
    """Return the tested patients of a run by repeat. Raises RunError."""
    found: dict[int, list[Predictions]] = {}
    for fold in fold_folders(folder):
        repeat = int(fold.name.split("_")[0].removeprefix("repeat"))
        found.setdefault(repeat, []).append(read_predictions(fold, "test", who))
    return {repeat: joined(parts) for repeat, parts in found.items()}


def collect(
    folder: Path, task: Task, cohort: Cohort, folds: Sequence[Fold], seed: int, simlp: bool = False
) -> dict[str, Any]:
    """Return all figures of a finished study, as JSON takes them; `simlp` if it was trained as well."""
    together = {who: pooled(folder, who) for who in (MODEL, BASELINE, *([SIMLP] if simlp else []))}
    found = {
        "cohort": {
            "patients": len(cohort.labels),
            "slides": len(cohort.slides),
            "instances": sum(s.instances or 0 for s in cohort.slides),
            "encoder": cohort.encoder,
            "classes": dict(zip(task.classes, _counts(task, cohort.labels.values()), strict=True)),
            "left_out": [list(pair) for pair in cohort.left_out],
            "renamed": [list(pair) for pair in cohort.renamed],
        },
        "bootstrap": {"unit": "patient", "resamples": RESAMPLES, "seed": seed, "level": 0.95},
        "pooled": {who: _figures(task, told, seed) for who, told in together.items()},
        **{f"model_minus_{who}": _difference(together[MODEL], told, seed) for who, told in together.items()
           if who != MODEL},
        "confusion": _confusion(list(together[MODEL].values())),
        "calibration": reliability(joined(together[MODEL].values())),
        "folds": [_fold(folder / "folds" / f.name, task, cohort, f, seed, list(together)) for f in folds],
    }  # fmt: skip
    if task.each:
        found["per_class"] = {who: per_class(task.classes, told, seed) for who, told in together.items()}
    return found


def _difference(one: Mapping[int, Predictions], other: Mapping[int, Predictions], seed: int) -> dict[str, Any]:
    delta, p_value = difference(FIGURES["auroc"], one, other, seed)
    return _jsonable({**asdict(delta), "p_value": p_value})


def per_class(classes: Sequence[str], found: Mapping[int, Predictions], seed: int) -> dict[str, Any]:
    """Return each class's figures against the rest, with intervals over patients."""
    figures: dict[str, Figure] = {
        "auroc": FIGURES["auroc"],
        "auprc": FIGURES["auprc"],
        "recall": lambda p, w: recall(p.labels, p.called, w),
    }
    return {
        name: {
            metric: _jsonable(asdict(interval(figure, {r: p.against_the_rest(label) for r, p in found.items()}, seed)))
            for metric, figure in figures.items()
        }
        for label, name in enumerate(classes)
    }


def _confusion(found: Sequence[Predictions]) -> dict[str, int] | list[list[int]]:
    """Return the counts of two classes by name, of more as a table: truth in rows, calls in columns."""
    if found[0].classes == 2:
        return _sum([confusion(one) for one in found])
    return np.sum([confusion_matrix(one) for one in found], axis=0).tolist()


def _figures(task: Task, found: Mapping[int, Predictions], seed: int) -> dict[str, Any]:
    return {name: _jsonable(asdict(interval(FIGURES[name], found, seed))) for name in task.metrics}


def _jsonable(figure: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: an interval that cannot be had (every resample has one class) is null."""
    return {name: value if np.isfinite(value) else None for name, value in figure.items()}


def _fold(path: Path, task: Task, cohort: Cohort, fold: Fold, seed: int, who: Sequence[str]) -> dict[str, Any]:
    record = read_record(path)
    with (path / "history.csv").open(newline="", encoding="utf-8") as file:
        history = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    best = max(history, key=lambda row: (row["validation_auroc"], -row["validation_loss"]))
    tested = read_predictions(path)
    return {
        "name": fold.name,
        "patients": {part: _classes(task, cohort, fold.part(part)) for part in PARTS},
        "slides": {part: len(fold.slides(cohort, part)) for part in PARTS},
        "epochs": len(history),
        "best_epoch": int(best["epoch"]),
        "validation_auroc": best["validation_auroc"],
        "threshold": record["threshold"],
        "calibration": record["calibration"],
        "confusion": _confusion([tested]),
        **{one: _figures(task, {0: read_predictions(path, "test", one)}, seed) for one in who},
    }


def _classes(task: Task, cohort: Cohort, patients: frozenset[str]) -> dict[str, int]:
    return dict(zip(task.classes, _counts(task, (cohort.labels[p] for p in patients)), strict=True))


def _counts(task: Task, labels: Iterable[int]) -> list[int]:
    counts = Counter(labels)
    return [counts[label] for label in range(len(task.classes))]


def _sum(tables: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(table[name] for table in tables) for name in tables[0]}


def reliability(found: Predictions, bins: int = 8) -> dict[str, Any]:
    """Return how often patients called p were positive: equally filled bins, and the expected calibration error.

    Of more than two classes: how often the likeliest class, called p, was the true one.
    """
    predicted, right = found.probability, found.labels
    if found.classes > 2:
        predicted, right = predicted.max(axis=1), (found.labels == found.called).astype(int)
    order = np.argsort(predicted, kind="stable")
    groups = [g for g in np.array_split(order, min(bins, max(1, len(order) // 5))) if len(g)]
    rows = [
        {"predicted": float(predicted[g].mean()), "observed": float(right[g].mean()), "patients": len(g)}
        for g in groups
    ]
    error = sum(row["patients"] * abs(row["predicted"] - row["observed"]) for row in rows) / max(1, len(order))
    return {"bins": rows, "expected_calibration_error": error}
