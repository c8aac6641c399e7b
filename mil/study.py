"""The order of a study: task → labels → features → split → folds → report. Everything is checked before a fold starts.

Invariant: a folder that holds a study of other data, settings or split is refused; the same one is continued, fold by
fold. It does not know who does the folds.
"""

import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import yaml

from engine import __version__
from engine.lock import RunLock
from engine.state import check_keys, plain, write_atomically
from mil.attended import ReadField
from mil.cohort import Cohort, match_features, read_labels
from mil.config import StudyConfig
from mil.dataset import BagCache
from mil.errors import RunError, StudyError
from mil.featurefiles import find_features, open_features
from mil.folds import FoldJob, MapFolds, do_fold
from mil.report import write_report
from mil.results import collect
from mil.saved import FoldFacts, read_record
from mil.splits import Fold, divide, division_csv, read_division
from mil.tasks import SplitScheme, Task, load_task

LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "h5py", "matplotlib")
VERSION = 1
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
    if config.splits is None:
        folds = divide(cohort, scheme, config.seed)
    else:
        folds = read_division(Path(config.splits), cohort, scheme)
    known = {slide.name for slide in labelled.slides} | {name for name, _ in labelled.left_out}
    return Study(config, task, cohort, files, scales, folds, len(set(files) - known))


def _check_given(config: StudyConfig, task: Task) -> None:
    missing = [f"--{name}" for name in ("features", "labels") if getattr(config, name) is None]
    missing += [
        f"--{name} {path} (there is no such {kind})"
        for name, path, kind in (("features", config.features, "folder"), ("labels", config.labels, "file"))
        if path is not None and not Path(path).exists()
    ]
    if missing:
        columns = ", ".join(dict.fromkeys([task.columns.patient, task.columns.slide, task.rules[0].column]))
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


def run(study: Study, map_folds: MapFolds, say: Say, command: str = "", read: ReadField | None = None) -> Path:
    """Do the folds that are not done, then the report; return the folder. `read` shows tiles as pictures in it.

    Raises: CanvasMismatchError for a folder with another study, RunError for one with something else, StudyError.
    """
    folder = study.folder
    _check_folder(folder)
    with RunLock(folder):
        digest = _take(study)
        _describe(study, command)
        jobs = [job for job in _jobs(study, digest) if not _is_done(job)]
        done = len(study.folds) - len(jobs)
        if done:
            say(f"{done} of {len(study.folds)} folds are done already.")
        for name in map_folds(do_fold, jobs):
            done += 1
            say(f"{name} done ({done}/{len(study.folds)}).")
        results = collect(study.folder, study.task, study.cohort, study.folds, study.config.seed)
        about = {"model": study.config.model.architecture, "scales": list(study.scales), "unlabelled": study.unlabelled}
        results = {"task": asdict(study.task), **about, **results}
        write_atomically(folder / "metrics.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
        write_report(folder, results, study.folds, study.cohort, read)
    return folder


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is neither empty nor a study's, touching nothing. Raises RunError."""
    if not folder.exists() or (folder / "study.json").is_file():
        return
    foreign = sorted(p.name for p in folder.iterdir() if p.name != "run.lock") if folder.is_dir() else ["a file"]
    if foreign:
        raise RunError(
            f"{folder} must be empty or hold a study (study.json); it holds {', '.join(foreign[:3])}. Use another "
            "output.folder."
        )


def _take(study: Study) -> str:
    """Make the folder this study's, or check that it is; return the digest of its keys."""
    path, keys = study.folder / "study.json", study.keys
    if path.is_file():
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(
                f"{path} must be JSON; it is damaged ({error}). Remove the folder to start again."
            ) from error
        if old.get("version") != VERSION:
            raise RunError(
                f"{path} must be of version {VERSION}; got {old.get('version')!r}. Use another output.folder."
            )
        check_keys(study.folder, old["keys"], keys)
    else:
        write_atomically(path, (json.dumps({"version": VERSION, "keys": keys}, indent=1) + "\n").encode())
    return _digest(keys)


def _describe(study: Study, command: str) -> None:
    """Write everything that is needed to repeat the study."""
    folder = study.folder
    config = replace(study.config, output=replace(study.config.output, folder=str(folder)))
    for name, content in (("config.yaml", asdict(config)), ("task.yaml", asdict(study.task))):
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
    write_atomically(folder / "environment.json", (json.dumps(environment, indent=1) + "\n").encode())


def _jobs(study: Study, digest: str) -> list[FoldJob]:
    classes = study.task.classes
    cache = BagCache(study.config.memory_mb * 2**20)
    facts = FoldFacts("", study.task.name, classes, study.scales, study.cohort.encoder, digest)
    jobs = []
    for at, fold in enumerate(study.folds):
        settings = {**study.config.classifier(), "seed": study.config.seed + at}
        used = {s.name: study.files[s.name].resolve() for s in study.cohort.slides}
        job_facts = replace(facts, name=fold.name)
        place = (study.folder / "folds" / fold.name).resolve()
        jobs.append(FoldJob(place, fold, study.cohort, used, job_facts, settings, study.config.threads, cache))
    return jobs


def _is_done(job: FoldJob) -> bool:
    return (job.folder / "fold.json").is_file() and read_record(job.folder)["digest"] == job.facts.digest


def outline(study: Study) -> str:
    """Say in a few lines what will be done."""
    counts = Counter(study.cohort.labels.values())
    negative, positive = study.task.classes
    lines = [
        f"{study.task.title or study.task.name}: {len(study.cohort.labels)} patients ({counts[1]} {positive}, "
        f"{counts[0]} {negative}), {len(study.cohort.slides)} slides, scales {', '.join(study.scales)}, "
        f"{sum(study.cohort.widths)} features per instance",
        f"{len(study.folds)} folds into {study.folder}",
    ]
    if study.cohort.left_out:
        names = ", ".join(f"{name} ({why})" for name, why in study.cohort.left_out[:5])
        lines.append(f"left out {len(study.cohort.left_out)}: {names}{' …' * (len(study.cohort.left_out) > 5)}")
    return "\n".join(lines)
