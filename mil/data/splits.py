"""Who is trained on, validated on and tested on: patients, never slides.

Invariant: a Division that exists was checked: no patient, no site where sites are kept together, and no source patient
of a synthetic slide is on both sides of a fold. Synthetic slides are only ever trained on. It does not know features.
Source of keeping sites together: Howard et al., Nature Communications 2021.
"""

import csv
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from engine.core.documents.tables import Table, read_table
from mil.data.cohort import Cohort, Slide
from mil.data.names import match_names, near_names, similar_names
from mil.data.tasks import SplitScheme
from mil.errors import LeakageError, SplitError

PARTS = ("train", "validation", "test")
_OURS = ("repeat", "fold", "patient", "part")
_CLAMS = ("train", "val", "test")
_CLAM = re.compile(r"splits_(\d+)\.csv")


@dataclass(frozen=True)
class Fold:
    """One division of the patients."""

    repeat: int
    number: int
    train: frozenset[str]
    validation: frozenset[str]
    test: frozenset[str]

    @property
    def name(self) -> str:
        return f"repeat{self.repeat}_fold{self.number}"

    def part(self, part: str) -> frozenset[str]:
        """Return the patients of one of PARTS."""
        return getattr(self, part)

    def slides(self, cohort: Cohort, part: str) -> list[Slide]:
        """Return the slides of a part; synthetic ones only of train."""
        wanted = self.part(part)
        return [s for s in cohort.slides if s.patient in wanted and (part == "train" or not s.synthetic)]


def kin(cohort: Cohort) -> dict[str, str]:
    """Return, for each patient, a name shared by all who must stay together: of synthetic slides and their sources.

    Raises: LeakageError for a synthetic slide that does not say from whom it was generated.
    """
    leader = {patient: patient for slide in cohort.slides for patient in (slide.patient, slide.source or slide.patient)}

    def find(patient: str) -> str:
        while leader[patient] != patient:
            patient = leader[patient]
        return patient

    for slide in cohort.slides:
        if slide.synthetic and slide.source is None:
            raise LeakageError(
                f"a synthetic slide must name the patient it was generated from; {slide.name} does not. Fill the "
                "column source_patient (columns.source of the task), or leave the slide out."
            )
        if slide.source is not None:
            first, second = sorted((find(slide.patient), find(slide.source)))
            leader[second] = first
    return {patient: find(patient) for patient in leader}


def divide(cohort: Cohort, scheme: SplitScheme, seed: int) -> tuple[Fold, ...]:
    """Draw the folds: stratified by label, nested validation, kin and (if asked) sites kept together.

    Raises: SplitError for fewer patients or sites than folds; LeakageError.
    """
    family = kin(cohort)
    real = {s.patient for s in cohort.slides if not s.synthetic}
    patients = sorted({s.patient for s in cohort.slides})
    labels = np.array([cohort.labels[p] for p in patients])
    groups = np.array([_group(p, cohort, scheme, family) for p in patients])
    classes = len(set(cohort.labels.values()))
    _check_enough(scheme, {p: cohort.labels[p] for p in real}, set(groups), classes)
    folds = []
    for repeat in range(scheme.repeats):
        for number, (rest, test) in enumerate(_k_folds(labels, groups, scheme.folds, seed + repeat)):
            inner = round(1 / scheme.validation)
            train, validation = next(_k_folds(labels[rest], groups[rest], inner, seed + repeat))
            parts = (rest[train], rest[validation], test)
            folds.append(Fold(repeat, number, *(frozenset(patients[i] for i in part) for part in parts)))
    check_division(cohort, folds, scheme)
    return tuple(folds)


def _group(patient: str, cohort: Cohort, scheme: SplitScheme, family: Mapping[str, str]) -> str:
    if scheme.scheme == "patient":
        return family[patient]
    return next(s.site for s in cohort.slides if s.patient == patient) or ""


def _check_enough(scheme: SplitScheme, labels: Mapping[str, int], groups: set[str], classes: int) -> None:
    need = scheme.folds + 1  # beside one per test fold, training and validation need one of each class
    counts = [sum(value == label for value in labels.values()) for label in range(classes)]
    if min(counts) < need:
        some = f"{counts[0]} negative and {counts[1]} positive"
        if classes > 2:
            some = ", ".join(f"{count} of class {label}" for label, count in enumerate(counts))
        raise SplitError(
            f"each class needs at least {need} patients for {scheme.folds} folds with validation; got {some}. Use "
            "fewer folds (--folds), or more patients."
        )
    if len(groups) < need and scheme.scheme == "site":
        raise SplitError(
            f"keeping sites together needs at least {need} sites for {scheme.folds} folds; got {len(groups)}. Use "
            "fewer folds, or split.scheme=patient."
        )


def _k_folds(labels: np.ndarray, groups: np.ndarray, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rest, part) indices. Small classes are judged by check_division, which names what is missing."""
    count = min(count, len(set(groups)))
    if count < 2:
        raise SplitError(
            "training patients must divide into training and validation; there is one group. Use fewer folds."
        )
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            yield from splitter.split(np.zeros(len(labels)), labels, groups)
    except ValueError as error:
        raise SplitError(f"patients cannot be divided into {count} parts: {error} Use fewer folds.") from error


def check_division(cohort: Cohort, folds: Sequence[Fold], scheme: SplitScheme) -> None:
    """Refuse what would make a result worthless. Raises LeakageError, or SplitError for a part without all classes."""
    wanted = len(set(cohort.labels.values()))
    family = kin(cohort)
    sites = {s.patient: s.site for s in cohort.slides}
    for fold in folds:
        _check_apart(fold, {p: p for part in PARTS for p in fold.part(part)}, "patient", PARTS)
        _check_apart(fold, family, "source patient of a synthetic slide (or its kin)", PARTS)
        if scheme.scheme == "site":
            _check_apart(fold, {p: s for p, s in sites.items() if s}, "site", PARTS)
        for part in PARTS:
            classes = {slide.label for slide in fold.slides(cohort, part)}
            if len(classes) < wanted:
                has = f"{len(classes)} of {wanted}" if wanted > 2 else "only one" if classes else "none"
                raise SplitError(
                    f"every part of a fold needs patients of {'both' if wanted == 2 else 'all'} classes; {part} of "
                    f"{fold.name} has {has}. Use fewer folds, another --seed, or more patients."
                )
    for repeat in {fold.repeat for fold in folds}:
        tested = [p for fold in folds if fold.repeat == repeat for p in fold.test]
        if twice := sorted({p for p in tested if tested.count(p) > 1}):
            raise SplitError(f"a patient must be tested once per repeat; {twice[0]} is tested more often. Correct it.")


def _check_apart(fold: Fold, keys: Mapping[str, str], what: str, parts: Sequence[str]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for part in parts:
        for patient in sorted(fold.part(part)):
            key = keys.get(patient, patient)
            other = seen.setdefault(key, (part, patient))
            if other[0] != part:
                raise LeakageError(
                    f"a {what} must be on one side of a split; in {fold.name}, {key} is in {other[0]} (patient "
                    f"{other[1]}) and in {part} (patient {patient}). Correct the split; nothing was trained."
                )


def read_division(path: Path, cohort: Cohort, scheme: SplitScheme) -> tuple[Fold, ...]:
    """Read a split that somebody made: our splits.csv, or CLAM's splits_K.csv (one, or a folder of them); checked.

    Patients without a part in a fold are not used in it. Raises: SplitError, LeakageError.
    """
    files = [path]
    if path.is_dir():
        numbered = {int(m[1]): p for p in path.iterdir() if (m := _CLAM.fullmatch(p.name))}
        files = [numbered[k] for k in sorted(numbered)]
    if not files or not files[0].is_file():
        raise SplitError(f"--splits must be a .csv or a folder with CLAM's splits_0.csv, …; {path} is not. Check it.")
    folds: list[Fold] = []
    for number, file in enumerate(files):
        table = read_table(file, [_OURS, _CLAMS], "--splits", SplitError)
        if set(table.names) >= set(_OURS):
            folds += _ours(table, cohort)
        elif set(table.names) >= set(_CLAMS):
            folds.append(_clams(table, number, cohort))
        else:
            raise SplitError(
                f"{file} must have the columns repeat, fold, patient, part, or CLAM's train, val, test; it has "
                f"{', '.join(filter(None, table.names)) or 'none'}. Correct the header."
            )
    known = set(cohort.labels)
    folds = [Fold(f.repeat, f.number, *(f.part(part) & known for part in PARTS)) for f in folds]
    _fill_repeats(folds)
    check_division(cohort, folds, scheme)
    return tuple(folds)


def _fill_repeats(folds: list[Fold]) -> None:
    """CLAM's random splits test a patient several times: each such fold becomes a repeat of its own."""
    tested = [patient for fold in folds for patient in fold.test]
    if len({f.repeat for f in folds}) == 1 and len(tested) != len(set(tested)):
        folds[:] = [Fold(at, 0, f.train, f.validation, f.test) for at, f in enumerate(folds)]


def _ours(table: Table, cohort: Cohort) -> Iterator[Fold]:
    parts: dict[tuple[int, int], dict[str, set[str]]] = {}
    patients = [row["patient"] for _, row in table.rows]
    spelt = match_names(patients, cohort.labels)
    if near := similar_names([p for p in patients if p not in spelt], cohort.labels):
        name, other = next(iter(near.items()))
        raise SplitError(
            f"{table.path} must name patients as the table of labels does; {len(near)} are only alike, such as "
            f"{name!r}{other}. Write them alike."
        )
    for line, row in table.rows:
        if row["part"] not in PARTS or not (row["repeat"] + row["fold"]).isdecimal():
            raise SplitError(
                f"{table.path}: a row must be repeat, fold, patient and one of {', '.join(PARTS)}; line {line} is "
                f"{', '.join(row.values())}. Correct it."
            )
        key = int(row["repeat"]), int(row["fold"])
        parts.setdefault(key, {part: set() for part in PARTS})[row["part"]].add(
            spelt.get(row["patient"], row["patient"])
        )
    for (repeat, number), found in sorted(parts.items()):
        yield Fold(repeat, number, *(frozenset(found[part]) for part in PARTS))


def _clams(table: Table, number: int, cohort: Cohort) -> Fold:
    """Read CLAM's columns of slide ids; a patient whose slides are in two columns is leakage."""
    owner = {slide.name: slide.patient for slide in cohort.slides}
    columns = [[row[name] for _, row in table.rows if row[name]] for name in _CLAMS]
    ids = [name for names in columns for name in names]
    spelt = match_names(ids, cohort.names) | {name: of for name, of in cohort.renamed if name in ids}
    parts: list[frozenset[str]] = []
    for names in columns:
        unknown = [name for name in names if name not in spelt]
        if unknown:
            raise SplitError(
                f"{table.path} must name slides of the table of labels; {len(unknown)} are not there, such as "
                f"{unknown[0]}.{near_names(unknown, cohort.names)} Use the split and the table of one study."
            )
        parts.append(frozenset(owner[spelt[name]] for name in names if spelt[name] in owner))
    return Fold(0, number, *parts)


def division_csv(folds: Sequence[Fold]) -> str:
    """Return the split as splits.csv, which --splits takes."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("repeat", "fold", "patient", "part"))
    for fold in folds:
        for part in PARTS:
            writer.writerows((fold.repeat, fold.number, patient, part) for patient in sorted(fold.part(part)))
    return table.getvalue()
