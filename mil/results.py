"""The figures of a study: per fold and pooled, with intervals over patients; the content of metrics.json.

It reads what folds wrote and computes nothing but figures. The pooled figure of a repeat takes every patient once, from
the fold that tested it; with several repeats it is their mean, and a patient is resampled in all of them together.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mil.cohort import Cohort
from mil.folds import BASELINE, MODEL, joined, read_predictions
from mil.metrics import FIGURES, RESAMPLES, Predictions, confusion, difference, interval
from mil.saved import fold_folders, read_record
from mil.splits import PARTS, Fold
from mil.tasks import Task

WHO = (MODEL, BASELINE)


def pooled(folder: Path, who: str = MODEL) -> dict[int, Predictions]:
    """Return the tested patients of a run by repeat. Raises RunError."""
    found: dict[int, list[Predictions]] = {}
    for fold in fold_folders(folder):
        repeat = int(fold.name.split("_")[0].removeprefix("repeat"))
        found.setdefault(repeat, []).append(read_predictions(fold, "test", who))
    return {repeat: joined(parts) for repeat, parts in found.items()}


def collect(folder: Path, task: Task, cohort: Cohort, folds: Sequence[Fold], seed: int) -> dict[str, Any]:
    """Return all figures of a finished study, as JSON takes them."""
    together = {who: pooled(folder, who) for who in WHO}
    delta, p_value = difference(FIGURES["auroc"], together[MODEL], together[BASELINE], seed)
    return {
        "cohort": {
            "patients": len(cohort.labels),
            "slides": len(cohort.slides),
            "instances": sum(s.instances or 0 for s in cohort.slides),
            "encoder": cohort.encoder,
            "classes": dict(zip(task.classes, _counts(cohort.labels.values()), strict=True)),
            "left_out": [list(pair) for pair in cohort.left_out],
        },
        "bootstrap": {"unit": "patient", "resamples": RESAMPLES, "seed": seed, "level": 0.95},
        "pooled": {who: _figures(task, together[who], seed) for who in WHO},
        "model_minus_baseline": {**asdict(delta), "p_value": p_value},
        "confusion": _sum([confusion(found) for found in together[MODEL].values()]),
        "calibration": reliability(joined(together[MODEL].values())),
        "folds": [_fold(folder / "folds" / fold.name, task, cohort, fold, seed) for fold in folds],
    }


def _figures(task: Task, found: Mapping[int, Predictions], seed: int) -> dict[str, Any]:
    return {name: _jsonable(asdict(interval(FIGURES[name], found, seed))) for name in task.metrics}


def _jsonable(figure: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: an interval that cannot be had (every resample has one class) is null."""
    return {name: value if np.isfinite(value) else None for name, value in figure.items()}


def _fold(path: Path, task: Task, cohort: Cohort, fold: Fold, seed: int) -> dict[str, Any]:
    record = read_record(path)
    with (path / "history.csv").open(newline="") as file:
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
        "confusion": confusion(tested),
        **{who: _figures(task, {0: read_predictions(path, "test", who)}, seed) for who in WHO},
    }


def _classes(task: Task, cohort: Cohort, patients: frozenset[str]) -> dict[str, int]:
    return dict(zip(task.classes, _counts(cohort.labels[p] for p in patients), strict=True))


def _counts(labels: Any) -> tuple[int, int]:
    counts = Counter(labels)
    return counts[0], counts[1]


def _sum(tables: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(table[name] for table in tables) for name in tables[0]}


def reliability(found: Predictions, bins: int = 8) -> dict[str, Any]:
    """Return how often patients called p were positive: equally filled bins, and the expected calibration error."""
    order = np.argsort(found.probability, kind="stable")
    groups = [g for g in np.array_split(order, min(bins, max(1, len(order) // 5))) if len(g)]
    rows = [
        {"predicted": float(found.probability[g].mean()), "observed": float(found.labels[g].mean()), "patients": len(g)}
        for g in groups
    ]
    error = sum(row["patients"] * abs(row["predicted"] - row["observed"]) for row in rows) / max(1, len(order))
    return {"bins": rows, "expected_calibration_error": error}
