"""The order of the protocol: study → synthetic bags → trials → figures → report. All is checked before a trial starts.

Invariant: all arms of a fold and a fraction share training, validation and test patients, seed and settings. A folder
of another protocol is refused; the same one is continued, trial by trial. It does not know who does the trials.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.core.files import RunLock
from engine.core.runtime import MapJobs
from mil.augmentation.config import AugmentConfig
from mil.augmentation.figures import collect
from mil.augmentation.generator import Exposure, exposure
from mil.augmentation.page import write_results
from mil.augmentation.subsets import subset
from mil.augmentation.synthetic import SyntheticBags, read_synthetic
from mil.augmentation.trials import Trial, do_trial, trial_name
from mil.data.dataset import BagCache
from mil.data.splits import Fold
from mil.errors import CohortError, StudyError
from mil.fit.store import FoldFacts, read_record
from mil.study import Say, Study, check_folder, describe, outline, prepare, read_through, take

MARKER = "augmentation.json"


@dataclass(frozen=True)
class Augmentation:
    """A protocol that was checked and can start."""

    config: AugmentConfig
    study: Study
    """The real cohort and its folds."""
    synthetic: SyntheticBags
    folds: dict[float, tuple[Fold, ...]]
    """Of each fraction."""
    exposure: Exposure
    """What the generator is known to have seen."""

    @property
    def folder(self) -> Path:
        return self.study.folder

    @property
    def keys(self) -> dict[str, object]:
        """Return what decides the figures, flat."""
        bags = [[s.name, s.source, s.label, self.synthetic.files[s.name].stat().st_size] for s in self.synthetic.slides]
        digest = hashlib.sha256(json.dumps(bags).encode()).hexdigest()
        own = json.loads(json.dumps(self.config.deciding_keys()))
        return {**self.study.keys, **own, "synthetic.bags": digest}


def real_folds(config: AugmentConfig) -> tuple[Study, dict[float, tuple[Fold, ...]]]:
    """Return the real cohort's study and the folds of each fraction. Raises StudyError, BagError."""
    study = prepare(config.study())
    output = replace(study.config.output, folder=config.output.folder or f"runs/augment/{study.task.name}")
    study = replace(study, config=replace(study.config, output=output))
    if made := [s.name for s in study.cohort.slides if s.synthetic]:
        raise CohortError(
            f"--features and --labels must be of real slides; {made[0]} is synthetic. Give synthetic bags by "
            "--synthetic, so that no arm takes them for real."
        )
    folds = {
        fraction: tuple(subset(fold, study.cohort, fraction, study.task.classes, config.seed) for fold in study.folds)
        for fraction in sorted(config.fractions)
    }
    return study, folds


def plan(config: AugmentConfig) -> Augmentation:
    """Read and check everything; writes nothing. Raises StudyError, BagError."""
    study, folds = real_folds(config)
    task, cohort = study.task, study.cohort
    synthetic = SyntheticBags((), {})
    if config.needs_synthetic:
        if config.synthetic is None:
            raise StudyError(
                "the arms real_synthetic and synthetic need --synthetic, a folder with cohort.csv and synthetic bags; "
                "there is none. Generate bags of training patients, or choose --arms [real,real_twice,real_noise]."
            )
        synthetic = read_synthetic(Path(config.synthetic), task, cohort, study.scales, config.tiles)
    found = Augmentation(config, study, synthetic, folds, exposure(config.generator, cohort))
    _ = list(_trials(found, ""))
    return found


def _trials(work: Augmentation, digest: str) -> Iterator[Trial]:
    """Yield all trials. Raises: SplitError, CohortError for an arm without bags of a class."""
    study, config = work.study, work.config
    cache = BagCache(config.memory_mb * 2**20)
    facts = FoldFacts(
        "", study.task.name, study.task.classes, study.scales, study.cohort.encoder, digest, config.coarse
    )
    files = {s.name: study.files[s.name].resolve() for s in study.cohort.slides}
    files |= {name: path.resolve() for name, path in work.synthetic.files.items()}
    for fraction, folds in work.folds.items():
        for at, fold in enumerate(folds):
            bags = work.synthetic.of(fold.train, config.amount) if config.needs_synthetic else []
            settings = {**study.config.classifier(), "seed": config.seed + at}
            for arm in config.arms:
                name = trial_name(fold, fraction, arm)
                own = tuple(bags) if "synthetic" in arm else ()
                judged = tuple(s for s in work.synthetic.slides if arm == "real" and s.source in fold.test)
                if arm == "synthetic":
                    _check_classes(name, {s.label for s in own}, study.task.classes)
                place = (work.folder / "folds" / name).resolve()
                yield Trial(place, fold, arm, fraction, study.cohort, own, files, replace(facts, name=name), settings,
                            config.noise, config.threads, cache, judged)  # fmt: skip


def _check_classes(name: str, labels: set[int], classes: Sequence[str]) -> None:
    if absent := [kind for label, kind in enumerate(classes) if label not in labels]:
        raise CohortError(
            f"the arm synthetic needs synthetic bags of each class; {name} has none of {', '.join(absent)}. Generate "
            "bags of more training patients, or leave the arm out with --arms."
        )


def told(work: Augmentation) -> str:
    """Say in a few lines what will be done."""
    lines = [outline(work.study).replace("folds into", "folds of the real cohort, into")]
    for fraction, folds in work.folds.items():
        patients = [len(fold.train) for fold in folds]
        span = f"{min(patients)}" if min(patients) == max(patients) else f"{min(patients)} to {max(patients)}"
        used = (
            [len(work.synthetic.of(fold.train, work.config.amount)) for fold in folds] if work.synthetic.slides else [0]
        )
        lines.append(
            f"fraction {fraction:g}: {span} training patients, {min(used)} to {max(used)} synthetic bags of them"
        )
    lines.append(f"{len(work.synthetic.slides)} synthetic bags; {work.exposure.sentence}")
    count = sum(len(folds) for folds in work.folds.values()) * len(work.config.arms)
    lines.append(f"{count} trainings: {', '.join(work.config.arms)}")
    return "\n".join(lines)


def run(work: Augmentation, map_trials: MapJobs, say: Say, command: str = "") -> Path:
    """Do the trials that are not done, then table, plot and report; return the folder.

    Raises: CanvasMismatchError for a folder with another protocol, RunError for one with something else, StudyError.
    """
    folder = work.folder
    check_folder(folder, MARKER)
    with RunLock(folder):
        digest = take(folder, work.keys, MARKER)
        describe(work.study, command, asdict(work.config))
        trials = list(_trials(work, digest))
        left = [trial for trial in trials if not _is_done(trial)]
        if left:
            read_through(work.study)
        done = len(trials) - len(left)
        if done:
            say(f"{done} of {len(trials)} trainings are done already.")
        for name in map_trials(do_trial, left):
            done += 1
            say(f"{name} done ({done}/{len(trials)}).")
        write_results(folder, collect(work.study, trials, work.config, work.exposure))
    return folder


def _is_done(trial: Trial) -> bool:
    return (trial.folder / "fold.json").is_file() and read_record(trial.folder)["digest"] == trial.facts.digest
