"""The order of a study: task → labels → features → split → folds → report. Everything is checked before a fold starts.

Invariant: a folder that holds a study of other data, settings or split is refused; the same one is continued, fold by
fold. It does not know who does the folds.
"""

import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from engine import __version__
from engine.core.errors import BagError
from engine.core.files import RunLock, check_keys, plain, write_atomically, write_json
from engine.core.runtime import MapJobs
from mil.data.cohort import Cohort, match_features, read_labels
from mil.data.dataset import BagCache, StoredBag
from mil.data.feature_files import find_features, open_features
from mil.data.names import match_names
from mil.data.splits import PARTS, Fold, divide, division_csv, read_division
from mil.data.tasks import SplitScheme, Task, load_task
from mil.errors import RunError, StudyError
from mil.fit.store import FoldFacts, read_record
from mil.folds.config import StudyConfig
from mil.folds.folds import FoldJob, do_fold
from mil.folds.results import collect
from mil.report.attended import ReadField
from mil.report.report import write_report

LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "h5py", "matplotlib")
VERSION = 1
STUDY = "study.json"
"""In a study's folder: what decides its figures."""
Say = Callable[[str], object]


@dataclass(frozen=True)
class Study:
    """A study that was checked and can start."""

    config: StudyConfig
    task: Task
    cohort: Cohort
    files: dict[str, Path]
    scales: tuple[str, ...]
    folds: tuple[Fold, ...]
    unlabelled: int
    """Features files without a row in the table of labels."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output.folder or f"runs/mil/{self.task.name}")

    @property
    def keys(self) -> dict[str, object]:
        """Return what decides the figures, flat."""
        slides = [[s.name, s.patient, s.label, s.site, s.source, s.instances] for s in self.cohort.slides]
        return plain(
            {
                **self.config.deciding_keys(),
                "scales": list(self.scales),
                "task.positive": self.task.positive,
                "task.negative": self.task.negative,
                **({"task.each": list(self.task.each)} if self.task.each else {}),
                "labels": _digest(slides),
                "features.encoder": self.cohort.encoder,
                "features.bytes": sum(self.files[s.name].stat().st_size for s in self.cohort.slides),
                "split": _digest(division_csv(self.folds)),
            }
        )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def prepare(config: StudyConfig) -> Study:
    """Read and check everything; writes nothing. Raises StudyError, BagError."""
    task = load_task(config.task)
    _check_given(config, task)
    overrides = {k: v for k, v in (("folds", config.folds), ("repeats", config.repeats)) if v is not None}
    scheme: SplitScheme = replace(task.split, **overrides)
    task = replace(task, split=scheme)
    files = find_features(Path(config.features or ""))
    labelled = read_labels(Path(config.labels or ""), task)
    scales = config.scale_names or _scales_of(next(iter(files.values())))
    cohort = match_features(labelled, files, scales, config.skip_missing)
    if config.coarse == "pooled":
        if len(scales) < 2:
            raise StudyError(
                f"--coarse pooled needs a fine scale and a coarser one to make of it; got {', '.join(scales)}. Use "
                "--scales 20,5."
            )
        cohort = replace(cohort, widths=cohort.widths[:1] * len(scales))
    if config.splits is None:
        folds = divide(cohort, scheme, config.seed)
    else:
        folds = read_division(Path(config.splits), cohort, scheme)
    known = match_names(labelled.names, files).values()
    return Study(config, task, cohort, files, scales, folds, len(set(files) - set(known)))


def _check_given(config: StudyConfig, task: Task) -> None:
    missing = [f"--{name}" for name in ("features", "labels") if getattr(config, name) is None]
    missing += [
        f"--{name} {path} (there is no such {kind})"
        for name, path, kind in (("features", config.features, "folder"), ("labels", config.labels, "file"))
        if path is not None and not Path(path).exists()
    ]
    if missing:
        columns = ", ".join(
            dict.fromkeys([task.columns.patient, task.columns.slide, *(rule.column for _, rule in task.rules)])
        )
        raise StudyError(
            f"A study needs the slides' features and a table of labels; missing: {' and '.join(missing)}.\n"
            "Make the features, then train on them:\n"
            "    python -m engine.extract_features --slides SLIDES --out RUN\n"
            f"    python -m mil.train --task {config.task} --features RUN/features --labels table.csv\n"
            f"table.csv has one row per slide, with the columns {columns}."
        )


def _scales_of(path: Path) -> tuple[str, ...]:
    file = open_features(path)
    file.close()
    return file.scales


def run(study: Study, map_folds: MapJobs, say: Say, command: str = "", read: ReadField | None = None) -> Path:
    """Do the folds that are not done, then the report; return the folder. `read` shows tiles as pictures in it.

    Raises: CanvasMismatchError for a folder with another study, RunError for one with something else, StudyError.
    """
    folder = study.folder
    check_folder(folder)
    with RunLock(folder):
        digest = take(folder, study.keys)
        describe(study, command, asdict(study.config))
        jobs = [job for job in _jobs(study, digest) if not _is_done(job)]
        if jobs:
            read_through(study)
        done = len(study.folds) - len(jobs)
        if done:
            say(f"{done} of {len(study.folds)} folds are done already.")
        for name in map_folds(do_fold, jobs):
            done += 1
            say(f"{name} done ({done}/{len(study.folds)}).")
        results = collect(study.folder, study.task, study.cohort, study.folds, study.config.seed, study.config.simlp)
        about = {"model": study.config.model.architecture, "scales": list(study.scales), "unlabelled": study.unlabelled}
        results = {"task": study.task.described(), **about, **results}
        write_atomically(folder / "metrics.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
        write_report(folder, results, study.folds, study.cohort, read)
    return folder


def check(study: Study) -> None:
    """Look at all that a run would stumble over later; writes nothing. Raises: what `run` raises, and BagError."""
    check_folder(study.folder)
    if (study.folder / STUDY).is_file():
        check_keys(study.folder, _read_keys(study.folder / STUDY), study.keys)
    config = study.config
    if not config.ray.enabled and config.device == "cuda" and not torch.cuda.is_available():
        raise StudyError("--device cuda needs a GPU that torch sees; there is none here. Use --device auto or cpu.")
    read_through(study)


def read_through(study: Study) -> None:
    """Read every bag once, as training does, one after the other. Raises BagError naming those that cannot be used."""
    faults = []
    for slide in study.cohort.slides:
        path = study.files[slide.name]
        try:
            StoredBag(path, study.scales, study.cohort.widths, BagCache(0), study.config.coarse).read()
            file = open_features(path)
            file.coords(study.scales[0])
            file.close()
        except BagError as error:
            faults.append((slide.name, error))
    if faults:
        names = ", ".join(name for name, _ in faults[1:6])
        more = f" So it is with {len(faults) - 1} more: {names}{_more(faults[1:])}." if len(faults) > 1 else ""
        raise BagError(f"{faults[0][1]}{more} Nothing was trained.") from faults[0][1]


def check_folder(folder: Path, marker: str = STUDY) -> None:
    """Refuse a folder that is neither empty nor a study's, touching nothing. Raises RunError."""
    if not folder.exists() or (folder / marker).is_file():
        return
    foreign = sorted(p.name for p in folder.iterdir() if p.name != "run.lock") if folder.is_dir() else ["a file"]
    if foreign:
        raise RunError(
            f"{folder} must be empty or hold a study ({marker}); it holds {', '.join(foreign[:3])}. Use another "
            "output.folder."
        )


def take(folder: Path, keys: dict[str, object], marker: str = STUDY) -> str:
    """Make the folder that of these keys, or check that it is; return their digest. Raises CanvasMismatchError."""
    path = folder / marker
    if path.is_file():
        check_keys(folder, _read_keys(path), keys)
    else:
        write_json(path, {"version": VERSION, "keys": keys})
    return _digest(keys)


def _read_keys(path: Path) -> dict[str, object]:
    try:
        old = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} must be JSON; it is damaged ({error}). Remove the folder to start again.") from error
    if old.get("version") != VERSION:
        raise RunError(f"{path} must be of version {VERSION}; got {old.get('version')!r}. Use another output.folder.")
    return old["keys"]


def describe(study: Study, command: str, config: dict[str, object]) -> None:
    """Write everything that is needed to repeat the study; `config` are the command's keys."""
    folder = study.folder
    config = {**config, "output": {"folder": str(folder)}}
    for name, content in (("config.yaml", config), ("task.yaml", study.task.described())):
        write_atomically(folder / name, yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False).encode())
    write_atomically(folder / "splits.csv", division_csv(study.folds).encode())
    labels = Path(study.config.labels or "")
    write_atomically(folder / f"labels{labels.suffix}", labels.read_bytes())
    environment = {
        "engine": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in LIBRARIES},
        "command": re.sub(r"\s+", " ", command),
    }
    write_json(folder / "environment.json", environment)


def _jobs(study: Study, digest: str) -> list[FoldJob]:
    classes = study.task.classes
    cache = BagCache(study.config.memory_mb * 2**20)
    facts = FoldFacts("", study.task.name, classes, study.scales, study.cohort.encoder, digest, study.config.coarse)
    jobs, simlp = [], study.config.simlp
    for at, fold in enumerate(study.folds):
        settings = {**study.config.classifier(), "seed": study.config.seed + at}
        used = {s.name: study.files[s.name].resolve() for s in study.cohort.slides}
        job_facts = replace(facts, name=fold.name)
        place = (study.folder / "folds" / fold.name).resolve()
        jobs.append(FoldJob(place, fold, study.cohort, used, job_facts, settings, study.config.threads, cache, simlp))
    return jobs


def _is_done(job: FoldJob) -> bool:
    return (job.folder / "fold.json").is_file() and read_record(job.folder)["digest"] == job.facts.digest


def outline(study: Study) -> str:
    """Say in a few lines what will be done."""
    counts = Counter(study.cohort.labels.values())
    order = range(len(study.task.classes)) if study.task.each else (1, 0)
    shown = ", ".join(f"{counts[label]} {study.task.classes[label]}" for label in order)
    lines = [
        f"{study.task.title or study.task.name}: {len(study.cohort.labels)} patients ({shown}), "
        f"{len(study.cohort.slides)} slides, scales {', '.join(study.scales)}, "
        f"{sum(study.cohort.widths)} features per instance",
        f"{len(study.folds)} folds into {study.folder}",
    ]
    for label in order:
        texts = [(text, count) for of, text, count in study.cohort.texts if of == label]
        if texts:
            column = study.task.rules[label if study.task.each else 0][1].column
            lines.append(f"{study.task.classes[label]} is where {column} is {_counted(texts)}")
    if study.cohort.renamed:
        pairs = ", ".join(f"{name!r} as {other!r}" for name, other in study.cohort.renamed[:5])
        lines.append(
            f"found {len(study.cohort.renamed)} slides under another spelling: {pairs}{_more(study.cohort.renamed)}"
        )
    if study.cohort.left_out:
        names = ", ".join(f"{name} ({why})" for name, why in study.cohort.left_out[:5])
        lines.append(f"left out {len(study.cohort.left_out)}: {names}{_more(study.cohort.left_out)}")
    if study.unlabelled:
        lines.append(f"{study.unlabelled} features files have no row in {study.config.labels}")
    if idle := sorted(
        set(study.cohort.labels) - {p for fold in study.folds for part in PARTS for p in fold.part(part)}
    ):
        lines.append(f"{len(idle)} patients are in no part of the split: {', '.join(idle[:5])}{_more(idle)}")
    return "\n".join(lines)


def _counted(texts: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{text!r} ({count} slides)" for text, count in texts[:5])
    return shown + (f" and {len(texts) - 5} other texts" if len(texts) > 5 else "")


def _more(items: Sequence[object]) -> str:
    return " …" * (len(items) > 5)
