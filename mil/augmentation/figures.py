"""The figures of a protocol: per fraction and arm, with paired differences over patients; the content of metrics.json.

It reads what trials wrote. A patient is tested once per repeat, by all arms alike, so a resample of patients is the
same for both sides of a difference.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mil.augmentation.config import ARMS, AugmentConfig
from mil.augmentation.generator import Exposure
from mil.augmentation.subsets import shares
from mil.augmentation.trials import SYNTHETIC, Trial
from mil.fit.metrics import FIGURES, RESAMPLES, Interval, Predictions, difference, interval
from mil.folds.folds import joined, read_predictions
from mil.study import Study

TREATED = "real_synthetic"
NAMES = {
    "real": "real",
    "real_twice": "real twice",
    "real_noise": "real + feature noise",
    "real_synthetic": "real + synthetic",
    "synthetic": "synthetic only",
}
Found = dict[int, Predictions]
"""Tested patients by repeat."""


def collect(study: Study, trials: Sequence[Trial], config: AugmentConfig, seen: Exposure) -> dict[str, Any]:
    """Return all figures of finished trials, as JSON takes them."""
    rows = []
    for fraction in sorted(config.fractions):
        own = [trial for trial in trials if trial.fraction == fraction]
        found = {arm: _pooled([trial for trial in own if trial.arm == arm]) for arm in ARMS if arm in config.arms}
        for arm, told in found.items():
            of_arm = [trial for trial in own if trial.arm == arm]
            rows.append(_row(study, of_arm, told, found.get(TREATED), config.seed))
    return {
        "task": study.task.described(),
        "model": study.config.model.architecture,
        "scales": list(study.scales),
        "encoder": study.cohort.encoder,
        "patients": len(study.cohort.labels),
        "folds": len(study.folds),
        "generator": {**asdict(seen), "sentence": seen.sentence},
        "noise": config.noise,
        "amount": config.amount,
        "bootstrap": {"unit": "patient", "resamples": RESAMPLES, "seed": config.seed, "level": 0.95},
        "kept": _kept([t for t in trials if t.judged and t.fraction == max(config.fractions)], config.seed),
        "arms": rows,
    }


def _pooled(trials: Sequence[Trial], part: str = "test") -> Found:
    parts: dict[int, list[Predictions]] = {}
    for trial in trials:
        parts.setdefault(trial.fold.repeat, []).append(read_predictions(trial.folder, part))
    return {repeat: joined(found) for repeat, found in parts.items()}


def _kept(trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """Return how well real bags teach to tell the label from synthetic ones, and from real ones of the same patients.

    None where no synthetic bag is of a tested patient.
    """
    made, real = _pooled(trials, SYNTHETIC), _pooled(trials)
    if not any(found.patients for found in made.values()):
        return None
    same = {repeat: real[repeat].only(found.patients) for repeat, found in made.items()}
    return {
        "fraction": trials[0].fraction,
        "patients": len({slide.source for trial in trials for slide in trial.judged}),
        "synthetic": plain(interval(FIGURES["auroc"], made, seed)),
        "real": plain(interval(FIGURES["auroc"], same, seed)),
    }


def kept_sentence(results: Mapping[str, Any]) -> str:
    """Say whether synthetic bags keep their label; nothing where no one can say."""
    kept = results["kept"]
    if kept is None or kept["synthetic"]["value"] is None:
        return ""
    return (
        f"Taught by real bags (fraction {kept['fraction']:g}), classifiers tell the label of {kept['patients']} test "
        f"patients with an AUROC of {shown(kept['real'])} from their real bags and {shown(kept['synthetic'])} from "
        "their synthetic ones. The further the second lies below the first, the more of the sign was lost in drawing"
    )


def _row(study: Study, trials: Sequence[Trial], found: Found, treated: Found | None, seed: int) -> dict[str, Any]:
    first = trials[0]
    count = [shares(trial.fold, study.cohort.labels, study.task.classes) for trial in trials]
    real = [len(trial.fold.slides(trial.cohort, "train")) for trial in trials]
    row: dict[str, Any] = {
        "fraction": first.fraction,
        "arm": first.arm,
        "training_patients": {name: float(np.mean([c[name] for c in count])) for name in study.task.classes},
        "real_bags": 0.0 if first.arm == "synthetic" else float(np.mean(real)),
        "synthetic_bags": float(np.mean([len(trial.synthetic) for trial in trials])),
    }
    row |= {name: plain(interval(FIGURES[name], found, seed)) for name in study.task.metrics}
    if treated is not None and first.arm != TREATED:
        delta, p_value = difference(FIGURES["auroc"], treated, found, seed)
        row["real_synthetic_minus_this"] = {**plain(delta), "p_value": p_value if np.isfinite(p_value) else None}
    return row


def plain(figure: Interval) -> dict[str, float | None]:
    """Return a figure as JSON takes it: what cannot be had is null."""
    return {name: value if np.isfinite(value) else None for name, value in asdict(figure).items()}


def shown(figure: Mapping[str, float | None] | None) -> str:
    """Return a figure with its interval as text."""
    if figure is None or figure["value"] is None:
        return ""
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def table_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the one table, as text."""
    metrics = list(results["task"]["metrics"])
    head = ["fraction", "arm", "training patients", "real bags", "synthetic bags", *metrics,
            "real + synthetic minus this arm (AUROC)", "p"]  # fmt: skip
    rows = []
    for row in results["arms"]:
        delta = row.get("real_synthetic_minus_this")
        p = "" if delta is None or delta["p_value"] is None else f"{delta['p_value']:.4f}"
        patients = " + ".join(f"{count:.4g} {name}" for name, count in row["training_patients"].items())
        counts = [f"{row[name]:.4g}" for name in ("real_bags", "synthetic_bags")]
        figures = [shown(row[name]) for name in metrics]
        rows.append([f"{row['fraction']:g}", NAMES[row["arm"]], patients, *counts, *figures, shown(delta), p])
    return head, rows


def as_text(results: Mapping[str, Any]) -> str:
    """Return the table for a terminal."""
    head, rows = table_rows(results)
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
             for line in [head, *rows]]  # fmt: skip
    note = f"{results['patients']} patients; 95 % intervals by paired bootstrap over patients"
    said = [text for text in (note, results["generator"]["sentence"], kept_sentence(results)) if text]
    return "\n".join([*said, "", *lines]) + "\n"


def as_csv(results: Mapping[str, Any]) -> str:
    """Return the table for programs: figures and their bounds in columns of their own."""
    rows = []
    for row in results["arms"]:
        flat = {name: row[name] for name in ("fraction", "arm", "real_bags", "synthetic_bags")}
        flat["training_patients"] = sum(row["training_patients"].values())
        figures = {name: row[name] for name in results["task"]["metrics"]}
        figures["real_synthetic_minus_this"] = row.get("real_synthetic_minus_this") or {}
        for name, figure in figures.items():
            flat |= {
                f"{name}{'' if key == 'value' else f'_{key}'}": figure.get(key) for key in ("value", "low", "high")
            }
        flat["p_value"] = figures["real_synthetic_minus_this"].get("p_value")
        rows.append(flat)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
