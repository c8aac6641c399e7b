"""Models on disk: one folder per fold with model.safetensors and fold.json, nothing pickled.

A stored fold says what it was trained on (scales, widths, encoder), so it refuses features of another encoder.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.core.runtime import choose_device
from mil.data.cohort import check_scales
from mil.data.dataset import BagCache, Coarse, StoredBag
from mil.data.feature_files import FeatureFile, joined_rows, open_features
from mil.errors import CohortError, RunError
from mil.fit.calibration import Calibration
from mil.fit.classifier import MILClassifier, restored
from mil.models import ModelConfig, build_model

VERSION = 2
"""Raise it when fold.json changes its meaning."""


@dataclass(frozen=True)
class FoldFacts:
    """What fold.json says beside the model's own settings."""

    name: str
    task: str
    classes: tuple[str, ...]
    scales: tuple[str, ...]
    encoder: str
    """Of the training features; "" when their files did not say."""
    digest: str
    """Of the study's keys."""
    coarse: Coarse = "stored"
    """Where vectors of coarser scales come from."""


@dataclass(frozen=True)
class SavedFold:
    """A fold's classifier and what it is about."""

    folder: Path
    facts: FoldFacts
    classifier: MILClassifier

    def check(self, file: FeatureFile) -> None:
        """Refuse features the model cannot know. Raises CohortError."""
        if self.facts.encoder and file.encoder and file.encoder != self.facts.encoder:
            raise CohortError(
                f"{file.path} must come from the model's encoder, {self.facts.encoder}; it was made by {file.encoder}. "
                "Extract the slide with that encoder, or train the model again on these features."
            )

    def bag(self, path: Path) -> tuple[StoredBag, int]:
        """Return a slide's bag as the model takes it, which stays in memory once read, and how many instances it has.

        Raises: CohortError for features that the model cannot know; BagError.
        """
        scales = self.facts.scales
        file = open_features(path)
        check_scales(path, file.scales, scales)
        self.check(file)
        widths = tuple(file.shape(scale)[1] for scale in scales)
        count = len(joined_rows(file, scales)[0])
        file.close()
        if self.facts.coarse == "pooled":
            widths = widths[:1] * len(widths)
        return StoredBag(path, scales, widths, BagCache(2**40), self.facts.coarse), count


def save_fold(folder: Path, classifier: MILClassifier, facts: FoldFacts) -> None:
    """Write model.safetensors and fold.json into an existing folder."""
    model = classifier.model_
    save_file(
        {name: value.contiguous().cpu() for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    record = {
        "version": VERSION,
        **{name: value for name, value in asdict(facts).items() if (name, value) != ("coarse", "stored")},
        "model": {name: value for name, value in asdict(model.config).items() if name != "classes"},  # see above
        "classifier": {**classifier.get_params(), "widths": model.config.widths},
        "calibration": asdict(classifier.calibration_),
        "threshold": classifier.threshold_,
    }
    (folder / "fold.json").write_text(json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of fold.json. Raises RunError."""
    path = folder / "fold.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} must say what the fold is; it cannot be read ({error}). Train the fold again."
        ) from error
    if record.get("version") != VERSION:
        raise RunError(
            f"{path} must be of version {VERSION}; got {record.get('version')!r}, of another release. Use that one."
        )
    return record


def facts_of(record: dict[str, Any]) -> FoldFacts:
    """Return the facts in a record of fold.json."""
    facts = {name: record[name] for name in ("name", "task", "encoder", "digest")}
    coarse = record.get("coarse", "stored")
    return FoldFacts(**facts, classes=tuple(record["classes"]), scales=tuple(record["scales"]), coarse=coarse)


def load_facts(path: Path) -> FoldFacts:
    """Return the facts of the fold at `path`, or of the first fold of the run there. Raises RunError."""
    folders = [path] if (path / "fold.json").is_file() else fold_folders(path)
    if not folders:
        raise RunError(f"{path} must be a run folder of mil.train, or a fold's folder in it; there is no fold.json.")
    return facts_of(read_record(folders[0]))


def load_fold(folder: Path, device: str = "auto") -> SavedFold:
    """Read one fold. Raises RunError when a file is missing or damaged."""
    record = read_record(folder)
    kept = {**record["model"], "widths": tuple(record["model"]["widths"]), "classes": len(record["classes"])}
    model = build_model(ModelConfig(**kept))
    path = folder / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RunError(
            f"{path} must hold the fold's weights; reading failed ({error}). Train the fold again."
        ) from error
    params = {**record["classifier"], "widths": tuple(record["classifier"]["widths"]), "device": device}
    calibration = Calibration(**record["calibration"])
    classifier = restored(params, model.to(choose_device(device, "device")), calibration, record["threshold"])
    return SavedFold(folder, facts_of(record), classifier)


def load_models(path: Path, device: str = "auto") -> list[SavedFold]:
    """Return the fold at `path`, or all folds of the run there; they are about one task and one kind of features.

    Raises: RunError.
    """
    if (path / "fold.json").is_file():
        return [load_fold(path, device)]
    folders = fold_folders(path)
    if not folders:
        raise RunError(
            f"{path} must be a run folder of mil.train, or a fold's folder in it; there is no fold.json. Train first: "
            "python -m mil.train --task hrd --features DIR --labels table.csv"
        )
    saved = [load_fold(folder, device) for folder in folders]
    first = replace(saved[0].facts, name="")
    if odd := [s.folder for s in saved if replace(s.facts, name="") != first]:
        raise RunError(f"all folds in {path} must be of one study; {odd[0].name} is of another. Remove that folder.")
    return saved


def fold_folders(run: Path) -> Sequence[Path]:
    """Return the finished folds of a run, in order."""
    return sorted((p.parent for p in run.glob("folds/*/fold.json")), key=lambda p: _numbers(p.name))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in name.split("_"))
