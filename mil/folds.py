"""One fold of a study: train, judge validation and test patients, store the model, its answers and its attention.

Invariant: a fold's folder appears whole or not at all, and its content follows from the job alone; so folds may be done
in any order, by any process, again. It does not know who runs it.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from engine.state import replacing_folder
from mil.baseline import MeanPoolClassifier
from mil.classifier import MILClassifier
from mil.cohort import Cohort, Slide
from mil.dataset import BagCache, StoredBag
from mil.errors import RunError
from mil.featurefiles import joined_rows, open_features
from mil.metrics import Predictions
from mil.saved import FoldFacts, save_fold
from mil.splits import Fold
from mil.training import Part, attention_of

BASELINE = "baseline"
MODEL = "model"
COLUMNS = ("part", "patient", "label", *(f"{who}_{what}" for who in (MODEL, BASELINE)
           for what in ("logit", "probability", "called")))  # fmt: skip


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


class MapFolds(Protocol):
    """Does jobs in any order; yields what `work` returned, as it comes."""

    def __call__(self, work: Callable[[FoldJob], str], jobs: Sequence[FoldJob]) -> Iterator[str]: ...


def one_by_one(work: Callable[[FoldJob], str], jobs: Sequence[FoldJob]) -> Iterator[str]:
    """Do the jobs in this process: the specification of MapFolds."""
    for job in jobs:
        yield work(job)


def do_fold(job: FoldJob) -> str:
    """Do a job; return the fold's name."""
    torch.set_num_threads(job.threads)
    slides = {part: job.fold.slides(job.cohort, part) for part in ("train", "validation", "test")}
    parts = {name: part_of(job, found) for name, found in slides.items()}
    classifier = MILClassifier(**job.classifier)
    train, validation = parts["train"], parts["validation"]
    classifier.fit(train.bags, train.labels, train.groups, validation)
    baseline = MeanPoolClassifier(seed=classifier.seed, scaling=classifier.scaling)
    baseline.fit(train.bags, train.labels, None, validation)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(job.folder, ("fold.json",)) as partial:
        with h5py.File(partial / "attention.h5", "w") as file:
            test_logit = _store_attention(file, job, classifier, slides["test"], parts["test"])
        logits = {"validation": classifier.decision_function(validation.bags), "test": test_logit}
        _write_predictions(partial / "predictions.csv", parts, logits, classifier, baseline)
        _write_rows(partial / "history.csv", [asdict(record) for record in classifier.history_])
        save_fold(partial, classifier, job.facts)
    return job.fold.name


def part_of(job: FoldJob, slides: Sequence[Slide]) -> Part:
    """Return the bags of slides, with labels and patients."""
    widths = job.cohort.widths
    bags = [StoredBag(job.files[slide.name], job.facts.scales, widths, job.cache) for slide in slides]
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
    return np.asarray(logits)


def write_attention(
    file: h5py.File, slide: str, path: Path, scales: Sequence[str], logit: float, attention: NDArray[np.float32]
) -> None:
    """Write one slide's attention (N,) with what a heatmap needs: coordinates and sizes in level-0 px, if known."""
    group = file.create_group(slide)
    group.create_dataset("attention", data=attention)
    group.attrs["logit"] = logit
    features = open_features(path)
    coords, tile, size = features.coords(scales[0]), features.tile_level0_px(scales[0]), features.level0_size()
    if coords is not None:
        group.create_dataset("coords", data=coords[joined_rows(features, scales)[0]])
    if tile is not None:
        group.attrs["tile_level0_px"] = tile
    if size is not None:
        group.attrs["level0_size"] = size
    features.close()


def _write_predictions(
    path: Path,
    parts: dict[str, Part],
    logits: dict[str, NDArray],
    classifier: MILClassifier,
    baseline: MeanPoolClassifier,
) -> None:
    rows: list[dict[str, object]] = []
    for name, found in logits.items():
        patients, mean, labels = parts[name].by_group(found)
        _, plain, _ = parts[name].by_group(baseline.decision_function(parts[name].bags))
        for i, patient in enumerate(patients):
            row: dict[str, object] = {"part": name, "patient": patient, "label": int(labels[i])}
            for who, logit, judge in ((MODEL, mean[i], classifier), (BASELINE, plain[i], baseline)):
                probability = float(judge.calibration_(logit))
                row |= {
                    f"{who}_logit": repr(float(logit)),
                    f"{who}_probability": repr(probability),
                    f"{who}_called": int(probability >= judge.threshold_),
                }
            rows.append(row)
    _write_rows(path, rows)


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_predictions(folder: Path, part: str = "test", who: str = MODEL) -> Predictions:
    """Return what a fold said about the patients of a part. Raises RunError."""
    path = folder / "predictions.csv"
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] == part]
        return Predictions(
            tuple(row["patient"] for row in rows),
            np.array([int(row["label"]) for row in rows]),
            np.array([float(row[f"{who}_probability"]) for row in rows]),
            np.array([row[f"{who}_called"] == "1" for row in rows]),
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
