"""The order of a probe: task → pictures → division → vectors → classifiers → figures → report.

Invariant: a folder that holds a probe of other pictures, encoder or settings is refused; the same one is continued,
block by block of vectors.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from engine.core.config import ModelConfigSection
from engine.core.files import RunLock, check_keys, write_atomically, write_json
from engine.core.runtime import choose_device, pin_arithmetic, settle_dtype, this_process
from engine.features.config import ExtractConfig
from engine.features.encoders import describe, load_encoders, scale_names
from engine.features.tile_encoders import FeatureConfig
from mil.errors import RunError, StudyError
from mil.fit.metrics import FIGURES, RESAMPLES, Predictions, confusion_matrix, interval
from mil.folds.folds import joined
from mil.folds.results import per_class
from mil.tiles.page import write_page
from mil.tiles.pictures import Division, Picture, divide, read_pictures
from mil.tiles.probe import PROBES, judge
from mil.tiles.tasks import TileTask, load_tile_task
from mil.tiles.vectors import encode_pictures

MARKER = "probe.json"
Say = Callable[[str], object]


@dataclass(frozen=True)
class ProbeConfig:
    """Everything a probe needs, as stored in config.yaml."""

    task: str = "crc"
    """Name of a task in configs/tasks/tiles/, or a YAML file like those."""
    data: str | None = None
    """Folder with one folder of pictures per class (inside train, val, test if divided), or a table of pictures."""
    test: str | None = None
    """A second folder or table, all of which is tested."""
    encoder: str = "zoomldm"
    """zoomldm (the U-Net's features), or an SSL encoder: demo, texture, uni, dinov2-reg-l, phikon,
    quiltnet, plip, clip."""
    validation: float = 0.2
    """Share of the training patients that chooses penalties and calibrates, where the set has no such part."""
    hidden: int = 256
    """Width of the perceptron's hidden layer."""
    seed: int = 0
    """Seed of the division, the classifiers and the bootstrap."""
    out: str | None = None
    """Run folder; None: runs/probe/TASK_ENCODER."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder computes."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    model: ModelConfigSection = field(default_factory=ModelConfigSection)

    def __post_init__(self) -> None:
        if not 0.05 <= self.validation <= 0.5 or self.hidden < 1:
            raise ValueError(
                f"validation in 0.05..0.5 and hidden >= 1 must hold; got {self.validation} and {self.hidden}."
            )


@dataclass(frozen=True)
class Probe:
    """A probe that was checked and can start."""

    config: ProbeConfig
    task: TileTask
    pictures: list[Picture]
    divisions: list[Division]

    @property
    def folder(self) -> Path:
        return Path(self.config.out or f"runs/probe/{self.task.name}_{self.config.encoder}")

    @property
    def extraction(self) -> ExtractConfig:
        config, section = self.config, self.config.model
        here = this_process(choose_device(config.device, "device"))
        dtype: Any = settle_dtype(section.dtype, lambda: None, here)
        model = replace(section, dtype=dtype)
        return ExtractConfig(slides="", encoders=(config.encoder,), features=config.features, model=model)


def prepare(config: ProbeConfig) -> Probe:
    """Read and check all but the pictures' pixels; writes nothing. Raises StudyError."""
    task = load_tile_task(config.task)
    if config.data is None:
        raise StudyError(
            "A probe needs pictures: --data FOLDER with one folder per class, or a table with the columns "
            f"{task.columns.file} and {task.columns.label}."
        )
    pictures = read_pictures(task, Path(config.data), None if config.test is None else Path(config.test))
    return Probe(config, task, pictures, divide(pictures, task, config.validation, config.seed))


def told(probe: Probe) -> str:
    """Say in a few lines what will be done."""
    counts = np.bincount([picture.label for picture in probe.pictures], minlength=len(probe.task.classes))
    shown = ", ".join(f"{count} {name}" for name, count in zip(probe.task.classes, counts, strict=True))
    patients = len({picture.patient for picture in probe.pictures})
    first = probe.divisions[0]
    how = f"{len(probe.divisions)} folds" if len(probe.divisions) > 1 else "the set's own division"
    return (
        f"{probe.task.title or probe.task.name}: {len(probe.pictures)} pictures ({shown}) of {patients} patients, or "
        f"pictures by themselves\n{how}; the first: {len(first.train)} to train on, {len(first.validation)} to "
        f"validate, {len(first.test)} to test; into {probe.folder}"
    )


def run(probe: Probe, say: Say) -> Path:
    """Encode, fit, judge and report; return the folder. Raises: RunError, CanvasMismatchError, StudyError."""
    folder, config = probe.folder, probe.config
    check_folder(folder)
    with RunLock(folder, "out"):
        _take(probe)
        content = json.loads(json.dumps(asdict(config)))
        write_atomically(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())
        labels = np.array([picture.label for picture in probe.pictures])
        patients = np.array([picture.patient for picture in probe.pictures])
        vectors = _vectors(probe, say)
        told: dict[str, Predictions] = {}
        chosen: dict[str, list[dict[str, float]]] = {}
        for name in PROBES:
            found = [
                judge(name, vectors, labels, patients, part, config.seed, config.hidden) for part in probe.divisions
            ]
            told[name], chosen[name] = joined([said for said, _ in found]), [how for _, how in found]
            say(f"{name} done.")
        results = collect(probe, told, chosen, vectors.shape[1])
        write_atomically(folder / "metrics.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
        write_atomically(folder / "predictions.csv", _predictions(probe, told).encode())
        write_page(folder, results, told)
    return folder


def check_folder(folder: Path) -> None:
    """Refuse a folder that is neither empty nor a probe's. Raises RunError."""
    if folder.exists() and not (folder / MARKER).is_file():
        foreign = sorted(p.name for p in folder.iterdir() if p.name != "run.lock") if folder.is_dir() else ["a file"]
        if foreign:
            raise RunError(
                f"{folder} must be empty or hold a probe ({MARKER}); it holds {foreign[0]}. Use another --out."
            )


def _take(probe: Probe) -> None:
    """Make the folder this probe's, or check that it is. Raises CanvasMismatchError, RunError."""
    config, path = probe.config, probe.folder / MARKER
    rows = [[str(p.path.resolve()), p.path.stat().st_size, p.label, p.patient, p.part] for p in probe.pictures]
    facts = describe(probe.extraction)[config.encoder]
    own = {name: value for name, value in asdict(config).items() if name in ("encoder", "validation", "hidden", "seed")}
    keys: dict[str, object] = {
        **own,
        "pictures": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "task.mpp": probe.task.mpp,
        "vectors": hashlib.sha256(json.dumps(dict(facts.attributes), sort_keys=True).encode()).hexdigest(),
    }
    if not path.is_file():
        write_json(path, {"keys": keys})
        return
    try:
        old = json.loads(path.read_text())["keys"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} must say what the probe is; it is damaged ({error}). Remove the folder.") from error
    check_keys(probe.folder, old, keys)


def _vectors(probe: Probe, say: Say) -> NDArray[np.float32]:
    config, extraction = probe.config, probe.extraction
    pin_arithmetic(config.model.threads)
    (encoder,) = load_encoders(extraction, choose_device(config.device, "device"))
    scale = scale_names(extraction)[0], extraction.grid.mpp
    return encode_pictures(probe.pictures, probe.task.mpp, encoder, scale, probe.folder / "vectors", say)


def collect(
    probe: Probe, told: dict[str, Predictions], chosen: dict[str, list[dict[str, float]]], width: int
) -> dict[str, Any]:
    """Return all figures, as JSON takes them; intervals are over patients (or pictures by themselves)."""
    task, seed = probe.task, probe.config.seed
    return {
        "task": asdict(task),
        "encoder": probe.config.encoder,
        "width": width,
        "pictures": len(probe.pictures),
        "tested": len(next(iter(told.values())).labels),
        "patients": len({picture.patient for picture in probe.pictures}),
        "divisions": len(probe.divisions),
        "bootstrap": {"unit": "patient", "resamples": RESAMPLES, "seed": seed, "level": 0.95},
        "probes": {
            name: {
                "figures": {m: _plain(asdict(interval(FIGURES[m], {0: found}, seed))) for m in task.metrics},
                "per_class": per_class(task.classes, {0: found}, seed),
                "confusion": confusion_matrix(found).tolist(),
                "chosen": chosen[name],
            }
            for name, found in told.items()
        },
    }


def _plain(figure: dict[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in figure.items()}


def _predictions(probe: Probe, told: dict[str, Predictions]) -> str:
    """Return predictions.csv: one row per tested picture, one probability per class and probe."""
    rows = np.concatenate([part.test for part in probe.divisions])
    table, classes = io.StringIO(), probe.task.classes
    head = [f"{name}: {what}" for name in told for what in (*(f"p({kind})" for kind in classes), "called")]
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "patient", "label", *head])
    for at, row in enumerate(rows):
        picture, cells = probe.pictures[row], []
        for found in told.values():
            cells += _cells(found, at, classes)
        writer.writerow([picture.path, picture.patient, classes[picture.label], *cells])
    return table.getvalue()


def _cells(found: Predictions, at: int, classes: Sequence[str]) -> list[str]:
    p = found.probability[at]
    columns = [1 - p, p] if found.probability.ndim == 1 else list(p)
    return [*(f"{value:.6f}" for value in columns), classes[int(found.called[at])]]
