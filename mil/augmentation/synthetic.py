"""Synthetic bags with their table, checked against the real cohort: whose they are, what they are, what they hold.

Invariant: a SyntheticBags that exists names each bag once, gives it its source patient's label, and holds no bag of a
patient whom the real table does not know. Whether a source patient may be learnt from is the split's affair.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.core.documents.tables import Table, read_table
from mil.data.cohort import Cohort, Slide, check_scales
from mil.data.feature_files import find_features, joined_rows, open_features
from mil.data.tasks import Task
from mil.data.values import says_nothing
from mil.errors import CohortError, LeakageError

COHORT = "cohort.csv"
COLUMNS = ("name", "label", "patient", "source_patient")
_PLACES = ("", "features", "bags")


@dataclass(frozen=True)
class SyntheticBags:
    """The synthetic bags of a folder."""

    slides: tuple[Slide, ...]
    """With their source patients; by name."""
    files: Mapping[str, Path]

    def of(self, patients: frozenset[str], amount: int | None) -> list[Slide]:
        """Return the bags whose source is among `patients`, at most `amount` of each. Raises CohortError for fewer."""
        found: dict[str, list[Slide]] = {patient: [] for patient in sorted(patients)}
        for slide in self.slides:
            if slide.source in found:
                found[slide.source].append(slide)
        if amount is not None and (few := [p for p, own in found.items() if len(own) < amount]):
            raise CohortError(
                f"--amount {amount} needs so many synthetic bags of each training patient; {few[0]} has "
                f"{len(found[few[0]])}, and {len(few) - 1} more have too few. Generate more, or take fewer."
            )
        return [slide for own in found.values() for slide in own[:amount]]


def read_synthetic(folder: Path, task: Task, cohort: Cohort, scales: Sequence[str], tiles: int) -> SyntheticBags:
    """Read and check a folder of synthetic bags. `tiles` is how many each must have.

    Raises: CohortError for a table or bag that does not fit; LeakageError for a bag of a patient nobody knows.
    """
    table = _table(folder)
    files = _files(folder)
    real = {slide.name for slide in cohort.slides}
    slides = []
    for line, row in table.rows:
        where = f"{table.path}, line {line} ({row['name']})"
        slides.append(_slide(row, where, task, cohort))
        if row["name"] in real:
            raise CohortError(f"{where}: a synthetic bag must not be called as a real slide is. Rename it.")
        if row["name"] not in files:
            raise CohortError(f"{where}: its bag must be in {folder}; there is no {row['name']}.h5. Generate it again.")
    if twice := [name for name, count in Counter(s.name for s in slides).items() if count > 1]:
        raise CohortError(f"{table.path} must name each bag once; {twice[0]} comes more than once. Remove the copies.")
    if not slides:
        raise CohortError(f"{table.path} must have a row per synthetic bag; it has none that is done. Generate some.")
    for slide in slides:
        _check_bag(files[slide.name], cohort, scales, tiles)
    return SyntheticBags(tuple(sorted(slides, key=lambda slide: slide.name)), files)


def _table(folder: Path) -> Table:
    path = folder / COHORT
    if not path.is_file():
        raise CohortError(
            f"--synthetic must be a folder with {COHORT} ({', '.join(COLUMNS)}) and bags; {folder} has no such table. "
            "Check the path."
        )
    table = read_table(path, [COLUMNS], "--synthetic", CohortError)
    if missing := [name for name in COLUMNS if name not in table.names]:
        raise CohortError(f"{path} must have the columns {', '.join(COLUMNS)}; it lacks {', '.join(missing)}.")
    # A cohort that is drawn here also lists rows that failed; those have no bag.
    rows = tuple((line, row) for line, row in table.rows if row.get("status", "") in ("", "done", "ok"))
    return Table(path, table.names, rows, table.separator)


def _files(folder: Path) -> dict[str, Path]:
    place = next((folder / name for name in _PLACES if any((folder / name).glob("*.h5"))), folder)
    return find_features(place)


def _slide(row: Mapping[str, str], where: str, task: Task, cohort: Cohort) -> Slide:
    """Return a row as a slide. Raises CohortError, LeakageError."""
    source, patient = row["source_patient"], row["patient"]
    for column in COLUMNS:
        if says_nothing(row[column]):
            raise CohortError(f"{where}: every row needs a {column}; it has {row[column]!r}. Fill it.")
    if source not in cohort.labels:
        raise LeakageError(
            f"{where}: the source patient must be one of the real cohort, or nobody knows on which side of a split it "
            f"is; {source!r} is none. Correct the table, or leave the row out."
        )
    if patient != source and patient in cohort.labels:
        raise LeakageError(
            f"{where}: a synthetic bag belongs to its source patient, {source}; the table gives it to {patient}, who "
            "may be tested. Correct the table."
        )
    label = _label(row["label"], where, task)
    if label != cohort.labels[source]:
        raise CohortError(
            f"{where}: a synthetic bag inherits its source patient's label; {source} is "
            f"{task.classes[cohort.labels[source]]}, the row says {task.classes[label]}. Correct the table."
        )
    return Slide(row["name"], patient, label, source=source, synthetic=True)


def _label(cell: str, where: str, task: Task) -> int:
    """Return the class a cell names, by the class's name or, where the task reads one column, by that column's rule."""
    if cell in task.classes:
        return task.classes.index(cell)
    columns = {rule.column for _, rule in task.rules}
    label = task.label({columns.pop(): cell}, where) if len(columns) == 1 else None
    if label is None:
        raise CohortError(
            f"{where}: the label must be one of {', '.join(task.classes)}, or what the task's rule reads; got {cell!r}."
            " Correct the table."
        )
    return label


def _check_bag(path: Path, cohort: Cohort, scales: Sequence[str], tiles: int) -> None:
    file = open_features(path)
    try:
        check_scales(path, file.scales, scales)
        if file.encoder != cohort.encoder:
            raise CohortError(
                f"{path} must come from the real bags' encoder, {cohort.encoder or 'unknown'}; it was made by "
                f"{file.encoder or 'unknown'}. Encode real and synthetic tiles alike."
            )
        widths = tuple(file.shape(scale)[1] for scale in scales)
        if widths[0] != cohort.widths[0] or len(widths) != len(cohort.widths):
            raise CohortError(f"{path} must be as wide as the real bags, {cohort.widths}; it is {widths}.")
        if not file.synthetic:
            raise CohortError(
                f"{path} must say that it is synthetic, so that nobody tests on it; it does not. Extract it with "
                "--synthetic true."
            )
        if (count := len(joined_rows(file, scales)[0])) < tiles:
            raise CohortError(f"{path} must have at least {tiles} tiles (--tiles); it has {count}. Generate more.")
    finally:
        file.close()
