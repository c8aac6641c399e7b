"""The cohort: a table of labels, checked against itself, the task and the features that are there.

Invariant: a Cohort that exists has all classes, one label per patient, one row per slide, and a features file of one
encoder and the scales asked for behind each slide. What was left out is listed with the reason, never dropped silently.
It does not know splits or models.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engine.core.documents.tables import Table, read_table
from mil.data.feature_files import UNKNOWN, joined_rows, open_features
from mil.data.names import alike, changed, match_names, near_names, similar_names
from mil.data.tasks import Rule, Task
from mil.data.values import decimal_sign, number, says_nothing, two_readings
from mil.errors import CohortError


@dataclass(frozen=True)
class Slide:
    """One row of the cohort."""

    name: str
    """As its features file is called, once that was looked at; before, as in the table."""
    patient: str
    label: int
    site: str | None = None
    source: str | None = None
    """Patient a synthetic slide was generated from."""
    synthetic: bool = False
    instances: int | None = None
    """Tiles of the finest scale; None before the features were looked at."""


@dataclass(frozen=True)
class Cohort:
    """The slides of a study, by name."""

    slides: tuple[Slide, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    """Slide and reason."""
    encoder: str = ""
    widths: tuple[int, ...] = ()
    """D of each scale, fine to coarse."""
    texts: tuple[tuple[int, str, int], ...] = ()
    """Of a task that compares text: label, text of the cell and number of slides, most frequent first."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Names in the table and of the features files, where they are not spelt alike."""

    @property
    def labels(self) -> dict[str, int]:
        """Return the label of each patient."""
        return {slide.patient: slide.label for slide in self.slides}

    @property
    def names(self) -> list[str]:
        """Return the names of all slides, those that were left out as well."""
        return [*(slide.name for slide in self.slides), *(name for name, _ in self.left_out)]


def read_labels(path: Path, task: Task) -> Cohort:
    """Read the table of labels. Raises CohortError, TaskError."""
    table = _table(path, task)
    columns = task.columns
    slides: list[Slide] = []
    left_out: list[tuple[str, str]] = []
    texts: Counter[tuple[int, str]] = Counter()
    for line, row in table.rows:
        name, patient = row[columns.slide], row[columns.patient]
        if says_nothing(name) or says_nothing(patient):
            raise CohortError(
                f"{path}: every row needs a {columns.slide} and a {columns.patient}; line {line} lacks one (it has "
                f"{name!r} and {patient!r}). Fill it."
            )
        label = task.label(row, f"{path}, line {line} ({name})")
        if label is None:
            left_out.append((name, task.why_not(row)))
            continue
        site = row[columns.site] if columns.site else None
        if site is not None and says_nothing(site):
            raise CohortError(
                f"{path}: every slide needs a {columns.site}; {name} (line {line}) has {site!r}. Fill it."
            )
        source = row.get(columns.source, "")
        source = None if says_nothing(source) else source
        slides.append(Slide(name, patient, label, site, source, source is not None))
        rule = task.rules[label if task.each else 0][1]
        texts.update([] if rule.needs_numbers else [(label, row[rule.column])])
    _check_rows(path, slides, left_out, task)
    shown = tuple((label, text, count) for (label, text), count in texts.most_common())
    return Cohort(tuple(sorted(slides, key=lambda s: s.name)), tuple(left_out), texts=shown)


def _table(path: Path, task: Task) -> Table:
    rules = [rule for _, rule in task.rules]
    wanted = [task.columns.patient, task.columns.slide, *(rule.column for rule in rules)]
    wanted += [task.columns.site] if task.columns.site else []
    table = read_table(path, [[*wanted, task.columns.source]], "--labels", CohortError)
    missing = [name for name in dict.fromkeys(wanted) if name not in table.names]
    if missing:
        near = [f"{m} (did you mean {c}?)" if (c := _near_column(m, table.names)) else m for m in missing]
        raise CohortError(
            f"{path} must have the columns {', '.join(dict.fromkeys(wanted))} of task {task.name}; it lacks "
            f"{', '.join(near)} and has {', '.join(filter(None, table.names)) or 'none'}. Rename columns, or name them "
            "in the task's YAML."
        )
    for rule in dict.fromkeys(rules):
        _read_numbers(table, rule)
    return table


def _near_column(name: str, there: Sequence[str]) -> str | None:
    lower = {other.casefold(): other for other in there}
    return next((lower[c] for c in get_close_matches(name.casefold(), lower, 1)), None)


def _read_numbers(table: Table, rule: Rule) -> None:
    """Rewrite numbers of a rule's column with a decimal comma as Python does, by what the whole column shows.

    Raises: CohortError for a cell that may be one number or another.
    """
    if not rule.needs_numbers and number(rule.value) is None:
        return
    sign = decimal_sign((row[rule.column] for _, row in table.rows), table.separator)
    for line, row in table.rows:
        cell = row[rule.column]
        value, unclear = number(cell, sign), two_readings(cell)
        if value is None and unclear:
            raise CohortError(
                f"{table.path}: every {rule.column} must be one number; line {line} has {cell!r}, which may be "
                f"{' or '.join(f'{v:g}' for v in unclear)}, and the column does not show which. Write it with a point "
                "and without separators of thousands, all of the column alike."
            )
        if value is not None and value != number(cell):
            row[rule.column] = repr(value)


def _check_rows(path: Path, slides: Sequence[Slide], left_out: Sequence[tuple[str, str]], task: Task) -> None:
    counts = Counter([*(slide.name for slide in slides), *(name for name, _ in left_out)])
    if twice := [name for name, n in counts.items() if n > 1]:
        raise CohortError(f"{path} must name each slide once; {_some(twice)} come more than once. Remove the copies.")
    people = [name for slide in slides for name in (slide.patient, slide.source) if name is not None]
    sites = [slide.site for slide in slides if slide.site is not None]
    for what, names in (("patient", people), ("site", sites)):
        if pairs := alike(names):
            shown = "; ".join(f"{a!r} and {b!r}" for a, b in pairs[:3])
            raise CohortError(
                f"{path}: a {what} must be spelt in one way, or it would be on both sides of a split; got {shown}. "
                "Write them alike, or rename one if they are not the same."
            )
    for what, value_of in (("label", lambda s: s.label), ("site", lambda s: s.site)):
        seen: dict[str, set[object]] = {}
        for slide in slides:
            seen.setdefault(slide.patient, set()).add(value_of(slide))
        if torn := [patient for patient, values in seen.items() if len(values) > 1]:
            raise CohortError(
                f"{path}: a patient must have one {what}, because patients are the unit of a split; {_some(torn)} have "
                "two. Correct the rows."
            )
    labels = {slide.label for slide in slides}
    if len(labels) < len(task.classes):
        only = ", ".join(task.classes[label] for label in sorted(labels)) or "none"
        why = f", and {len(left_out)} left out ({left_out[0][0]}: {left_out[0][1]})" if left_out else ""
        raise CohortError(
            f"{path} must have patients of {'all' if task.each else 'both'} classes by "
            f"`{task.positive or '`, `'.join(task.each)}`; got only: {only}{why}. Check the rule "
            "and its column; a text such as - or none is a class when a rule names it (`negative: status == -`)."
        )


def match_features(
    cohort: Cohort, files: Mapping[str, Path], scales: Sequence[str], skip_missing: bool = False
) -> Cohort:
    """Look at the features of every slide and return the cohort that can be learnt from.

    Slides without tiles are left out and listed; those without a file too, if `skip_missing`.
    Raises: CohortError for missing files, other encoders or widths; BagError for damaged files or missing scales.
    """
    names = match_names(cohort.names, files)
    absent = [slide.name for slide in cohort.slides if slide.name not in names]
    if absent and not skip_missing:
        raise CohortError(
            f"every labelled slide must have features; {len(absent)} of {len(cohort.slides)} have none: "
            f"{_some(absent)}.{near_names(absent, files)} Extract them, write the names in the table as the files have "
            "them, or leave them out with --skip_missing true."
        )
    near = similar_names(absent, files)
    left_out = [*cohort.left_out, *((name, f"no features file{near.get(name, '')}") for name in absent)]
    slides: list[Slide] = []
    encoders: dict[str, str] = {}
    widths: dict[tuple[int, ...], str] = {}
    for listed in cohort.slides:
        if listed.name not in names:
            continue
        slide = replace(listed, name=names[listed.name])
        file = open_features(files[slide.name])
        check_scales(file.path, file.scales, scales)
        shapes = [file.shape(scale) for scale in scales]
        if shapes[0][0]:  # a file without tiles may not know its width, and is left out anyway
            encoders.setdefault(file.encoder, slide.name)
            widths.setdefault(tuple(width for _, width in shapes), slide.name)
        synthetic = slide.synthetic or file.synthetic
        instances = len(joined_rows(file, scales)[0])
        file.close()
        if instances:
            slides.append(replace(slide, synthetic=synthetic, instances=instances))
        else:
            left_out.append((slide.name, "no tiles" if not shapes[0][0] else "no tile could be read"))
    _check_one("encoder", encoders)
    _check_one("width", widths)
    left, wanted = ({slide.label for slide in of} for of in (slides, cohort.slides))
    if left < wanted:
        raise CohortError(
            f"{'both' if len(wanted) == 2 else 'all'} classes must have slides with tiles; {len(slides)} slides are "
            f"left, of {'one class' if len(left) < 2 else f'{len(left)} of {len(wanted)} classes'}. Extract more."
        )
    slides.sort(key=lambda slide: slide.name)
    encoder, width = next(iter(encoders)), next(iter(widths))
    used = {slide.name for slide in slides}
    return Cohort(tuple(slides), tuple(left_out), encoder, width, cohort.texts, changed(names, used))


def check_scales(path: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a file without the scales asked for. Raises CohortError."""
    if tuple(found) == (UNKNOWN,) and len(wanted) == 1:
        return
    if lacking := [scale for scale in wanted if scale not in found]:
        told = "one scale of unknown magnification" if tuple(found) == (UNKNOWN,) else ", ".join(found)
        raise CohortError(
            f"{path} must hold {' and '.join(wanted)} for --scales; it lacks {', '.join(lacking)} and holds {told}. "
            "Extract these scales, or choose others with --scales."
        )


def _check_one(what: str, seen: Mapping[Any, str]) -> None:
    if len(seen) > 1:
        shown = "; ".join(f"{value or 'unknown'} in {name}" for value, name in list(seen.items())[:4])
        raise CohortError(
            f"all features must have one {what}; got {len(seen)}: {shown}. Extract all slides with one encoder."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
