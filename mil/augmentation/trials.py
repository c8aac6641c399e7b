"""One training of the protocol: an arm at a fraction in a fold. Its folder appears whole or not at all.

Invariant: what a trial trains on is real bags of its training patients and synthetic bags whose source patients are
among them, and nothing else; it validates and tests on real bags alone, and judges synthetic ones of test patients
apart. It does not know who runs it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.files import replacing_folder
from mil.data.cohort import Cohort, Slide
from mil.data.dataset import Bag, BagCache, StoredBag
from mil.data.splits import Fold
from mil.errors import LeakageError
from mil.fit.classifier import MILClassifier
from mil.fit.store import FoldFacts, save_fold
from mil.fit.training import Part
from mil.folds.folds import MODEL, write_predictions, write_rows

SYNTHETIC = "synthetic"
"""Part of the predictions: test patients, judged by synthetic bags."""


@dataclass(frozen=True)
class Trial:
    """Everything a process needs for one training; travels between processes, without features."""

    folder: Path
    fold: Fold
    """Training and validation patients are those of the fraction."""
    arm: str
    fraction: float
    cohort: Cohort
    """Real slides."""
    synthetic: tuple[Slide, ...]
    """Bags of the fold's training patients."""
    files: dict[str, Path]
    facts: FoldFacts
    classifier: dict[str, Any]
    """Parameters of MILClassifier."""
    noise: float
    threads: int
    cache: BagCache
    judged: tuple[Slide, ...] = ()
    """Synthetic bags of its test patients: what it says of them tells whether they keep their label."""

    def __post_init__(self) -> None:
        strangers = sorted({s.name for s in self.synthetic if s.source not in self.fold.train})
        if strangers:
            raise LeakageError(
                f"a synthetic bag must come from a patient that its arm trains on; {strangers[0]} of {self.name} does "
                "not. Nothing was trained."
            )

    @property
    def name(self) -> str:
        return trial_name(self.fold, self.fraction, self.arm)


def trial_name(fold: Fold, fraction: float, arm: str) -> str:
    """Return the name of a trial's folder."""
    return f"{fold.name}_fraction{fraction:g}_{arm}"


class NoisyBag:
    """A bag with Gaussian noise on its features, the same at every reading."""

    def __init__(self, bag: Bag, deviation: NDArray[np.float32], seed: int) -> None:
        """`deviation` (D,) is that of the noise."""
        self.name, self.widths = f"{bag.name} with noise", bag.widths
        self._bag, self._deviation = bag, deviation
        self._key = (seed, int.from_bytes(hashlib.sha256(bag.name.encode()).digest()[:8], "big"))

    def read(self) -> NDArray[Any]:
        array = np.asarray(self._bag.read(), np.float32)
        return array + self._deviation * np.random.default_rng(self._key).standard_normal(array.shape, np.float32)


def feature_deviation(bags: Sequence[Bag]) -> NDArray[np.float32]:
    """Return the deviation of each feature over all instances, each bag counting the same: (D,)."""
    arrays = [np.asarray(bag.read(), np.float64) for bag in bags]
    mean = np.mean([array.mean(axis=0) for array in arrays], axis=0)
    square = np.mean([((array - mean) ** 2).mean(axis=0) for array in arrays], axis=0)
    return np.sqrt(square).astype(np.float32)


def training_part(trial: Trial) -> Part:
    """Return what the trial's arm trains on."""
    real = trial.fold.slides(trial.cohort, "train")
    slides = {
        "real": real,
        "real_twice": [*real, *real],
        "real_noise": [*real, *real],
        "real_synthetic": [*real, *trial.synthetic],
        "synthetic": list(trial.synthetic),
    }[trial.arm]
    part = _part(trial, slides)
    if trial.arm != "real_noise":
        return part
    deviation = trial.noise * feature_deviation(part.bags[: len(real)])
    noisy = [NoisyBag(bag, deviation, trial.classifier["seed"]) for bag in part.bags[len(real) :]]
    return replace(part, bags=[*part.bags[: len(real)], *noisy])


def _part(trial: Trial, slides: Sequence[Slide]) -> Part:
    widths, facts = trial.cohort.widths, trial.facts
    bags = [StoredBag(trial.files[s.name], facts.scales, widths, trial.cache, facts.coarse) for s in slides]
    return Part(bags, np.array([s.label for s in slides]), np.array([s.patient for s in slides]))


def do_trial(trial: Trial) -> str:
    """Train, judge validation and test patients, and store it; return the trial's name."""
    torch.set_num_threads(trial.threads)
    parts = {part: _part(trial, trial.fold.slides(trial.cohort, part)) for part in ("validation", "test")}
    if trial.judged:
        parts[SYNTHETIC] = _part(trial, [replace(s, patient=s.source or s.patient) for s in trial.judged])
    train = training_part(trial)
    classifier = MILClassifier(**trial.classifier).fit(train.bags, train.labels, train.groups, parts["validation"])
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(trial.folder, ("fold.json",)) as partial:
        logits = {name: classifier.decision_function(part.bags) for name, part in parts.items()}
        write_predictions(partial / "predictions.csv", parts, {MODEL: classifier}, logits, trial.facts.classes)
        write_rows(partial / "history.csv", [asdict(record) for record in classifier.history_])
        save_fold(partial, classifier, trial.facts)
    return trial.name
