"""One fold of a study: train, judge validation and test patients, store the model, its answers and its attention.

Invariant: a fold's folder appears whole or not at all, and its content follows from the job alone; so folds may be done
in any order, by any process, again. It does not know who runs it.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.files import replacing_folder
from mil.data.cohort import Cohort, Slide
from mil.data.dataset import BagCache, StoredBag
from mil.data.feature_files import joined_rows, open_features
from mil.data.splits import Fold
from mil.errors import RunError
from mil.fit.baseline import MeanPoolClassifier
from mil.fit.calibration import Calibration, called
from mil.fit.classifier import MILClassifier
from mil.fit.metrics import Predictions
from mil.fit.store import FoldFacts, save_fold
from mil.fit.training import Part, attention_of

BASELINE = "baseline"
MODEL = "model"
SIMLP = "simlp"
"""The second baseline, where it is asked for; the name of its model, too."""


@dataclass(frozen=True)
class FoldJob:
    """Everything a process needs to do a fold; travels between processes, without features."""

    folder: Path
    fold: Fold
    cohort: Cohort
    files: dict[str, Path]
    facts: FoldFacts
    classifier: dict[str, Any]
    """Parameters of MILClassifier."""
    threads: int
    cache: BagCache
    simlp: bool = False
    """Train SiMLP as a second baseline."""


class Judge(Protocol):
    """Says what bags are: the model or a baseline."""

    calibration_: Calibration
    threshold_: float | None

    def decision_function(self, bags: Sequence[Any]) -> NDArray[np.float64]: ...


def do_fold(job: FoldJob) -> str:
    """Do a job; return the fold's name."""
    torch.set_num_threads(job.threads)
    slides = {part: job.fold.slides(job.cohort, part) for part in ("train", "validation", "test")}
    parts = {name: part_of(job, found) for name, found in slides.items()}
    classifier = MILClassifier(**job.classifier)
    train, validation = parts["train"], parts["validation"]
    classifier.fit(train.bags, train.labels, train.groups, validation)
    judges: dict[str, Judge] = {MODEL: classifier}
    baseline = MeanPoolClassifier(seed=classifier.seed, scaling=classifier.scaling)
    judges[BASELINE] = baseline.fit(train.bags, train.labels, None, validation)
    if job.simlp:
        plain = MILClassifier(**{**job.classifier, "model": SIMLP, "widths": None})
        judges[SIMLP] = plain.fit(train.bags, train.labels, train.groups, validation)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(job.folder, ("fold.json",)) as partial:
        with h5py.File(partial / "attention.h5", "w") as file:
            test_logit = _store_attention(file, job, classifier, slides["test"], parts["test"])
        logits = {"validation": classifier.decision_function(validation.bags), "test": test_logit}
        judged = {name: parts[name] for name in logits}
        write_predictions(partial / "predictions.csv", judged, judges, logits, job.facts.classes)
        write_rows(partial / "history.csv", [asdict(record) for record in classifier.history_])
        save_fold(partial, classifier, job.facts)
    return job.fold.name


def part_of(job: FoldJob, slides: Sequence[Slide]) -> Part:
    """Return the bags of slides, with labels and patients."""
    widths, facts = job.cohort.widths, job.facts
    bags = [StoredBag(job.files[s.name], facts.scales, widths, job.cache, facts.coarse) for s in slides]
    return Part(bags, np.array([s.label for s in slides]), np.array([s.patient for s in slides]))


def _store_attention(
    file: h5py.File, job: FoldJob, classifier: MILClassifier, slides: Sequence[Slide], part: Part
) -> NDArray[np.float64]:
    """Write attention and coordinates of the test slides; return their logits."""
    device, logits = next(classifier.model_.parameters()).device, []
    answers = attention_of(classifier.model_, part.bags, device, classifier.precision)
    for slide, (logit, attention) in zip(slides, answers, strict=True):
        logits.append(logit)
        write_attention(file, slide.name, job.files[slide.name], job.facts.scales, logit, attention)
        file[slide.name].attrs["label"] = slide.label
    if len(job.facts.classes) > 2:
        for slide, seen in zip(slides, classifier.class_maps(part.bags), strict=True):
            write_classes(file, slide.name, seen)
    return np.asarray(logits)


def write_classes(file: h5py.File, slide: str, seen: NDArray[np.float64]) -> None:
    """Write what the model sees in each tile by itself beside its attention: probabilities (N, classes)."""
    file[slide].create_dataset("probability", data=seen.astype(np.float32))  # type: ignore[union-attr]


def write_attention(
    file: h5py.File,
    slide: str,
    path: Path,
    scales: Sequence[str],
    logit: float | NDArray,
    attention: NDArray[np.float32],
) -> None:
    """Write one slide's attention (N,) with what a heatmap needs: coordinates and sizes in level-0 px, if known."""
    group = file.create_group(slide)
    group.create_dataset("attention", data=attention)
    group.attrs["logit"] = float(logit) if np.ndim(logit) == 0 else np.asarray(logit)
    features = open_features(path)
    coords, tile, size = features.coords(scales[0]), features.tile_level0_px(scales[0]), features.level0_size()
    if coords is not None:
        group.create_dataset("coords", data=coords[joined_rows(features, scales)[0]])
    if tile is not None:
        group.attrs["tile_level0_px"] = tile
    if size is not None:
        group.attrs["level0_size"] = size
    if (series := features.series()) is not None:
        group.attrs["series"] = series
    features.close()


def write_predictions(
    path: Path, parts: dict[str, Part], judges: dict[str, Judge], logits: dict[str, NDArray], classes: Sequence[str]
) -> None:
    """Write what each judge says of each patient of `parts`; `logits` are the model's, made already."""
    rows: list[dict[str, object]] = []
    for name, part in parts.items():
        found = {who: judge.decision_function(part.bags) for who, judge in judges.items() if who != MODEL}
        found[MODEL] = logits[name]
        means = {who: part.by_group(logit)[1] for who, logit in found.items()}
        patients, _, labels = part.by_group(found[MODEL])
        said = {who: judge.calibration_(means[who]) for who, judge in judges.items()}
        calls = {who: called(said[who], judge.threshold_) for who, judge in judges.items()}
        for i, patient in enumerate(patients):
            row: dict[str, object] = {"part": name, "patient": patient, "label": int(labels[i])}
            for who in judges:
                row |= _columns(f"{who}_logit", means[who][i], classes)
                row |= _columns(f"{who}_probability", said[who][i], classes) | {f"{who}_called": int(calls[who][i])}
            rows.append(row)
    write_rows(path, rows)


def _columns(name: str, values: NDArray[np.float64], classes: Sequence[str]) -> dict[str, object]:
    """Return one column, or of more than two classes one each, by their names."""
    if np.ndim(values) == 0:
        return {name: repr(float(values))}
    return {f"{name}_{kind}": repr(float(value)) for kind, value in zip(classes, values, strict=True)}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_predictions(folder: Path, part: str = "test", who: str = MODEL) -> Predictions:
    """Return what a fold said about the patients of a part. Raises RunError."""
    path = folder / "predictions.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] == part]
        head = f"{who}_probability"
        columns = [name for name in (rows[0] if rows else ()) if name.startswith(f"{head}_")]
        return Predictions(
            tuple(row["patient"] for row in rows),
            np.array([int(row["label"]) for row in rows]),
            np.array([[float(row[name]) for name in columns] if columns else float(row[head]) for row in rows]),
            np.array([int(row[f"{who}_called"]) if columns else row[f"{who}_called"] == "1" for row in rows]),
        )
    except (OSError, KeyError, ValueError) as error:
        raise RunError(
            f"{path} must hold the fold's predictions; it cannot be read ({error}). Train it again."
        ) from error


def joined(found: Iterable[Predictions]) -> Predictions:
    """Return the predictions of several folds as one."""
    parts = list(found)
    return Predictions(
        tuple(patient for p in parts for patient in p.patients),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([p.probability for p in parts]),
        np.concatenate([p.called for p in parts]),
    )
