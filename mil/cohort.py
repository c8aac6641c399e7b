"""The cohort: a table of labels, checked against itself, the task and the features that are there.

Invariant: a Cohort that exists has both classes, one label per patient, one row per slide, and a features file of one
encoder and the scales asked for behind each slide. What was left out is listed with the reason, never dropped silently.
It does not know splits or models.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mil.errors import CohortError
from mil.featurefiles import UNKNOWN, joined_rows, open_features
from mil.tasks import Task


@dataclass(frozen=True)
class Slide:
    """One row of the cohort."""

    name: str
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

    @property
    def labels(self) -> dict[str, int]:
        """Return the label of each patient."""
        return {slide.patient: slide.label for slide in self.slides}


def read_labels(path: Path, task: Task) -> Cohort:
    """Read the table of labels. Raises CohortError, TaskError."""
    rows = _rows(path, task)
    columns = task.columns
    slides: list[Slide] = []
    left_out: list[tuple[str, str]] = []
    for number, row in enumerate(rows, 2):
        name, patient = row[columns.slide].strip(), row[columns.patient].strip()
        if not name or not patient:
            raise CohortError(
                f"{path}: every row needs a {columns.slide} and a {columns.patient}; line {number} lacks one. Fill it."
            )
        label = task.label(row, f"{path}, line {number} ({name})")
        if label is None:
            left_out.append((name, "no label, or neither positive nor negative"))
            continue
        site = row[columns.site].strip() if columns.site else None
        if columns.site and not site:
            raise CohortError(f"{path}: every slide needs a {columns.site}; {name} (line {number}) has none. Fill it.")
        source = row.get(columns.source, "").strip() or None
        slides.append(Slide(name, patient, label, site, source, source is not None))
    _check_rows(path, slides, left_out, task)
    return Cohort(tuple(sorted(slides, key=lambda s: s.name)), tuple(left_out))


def _rows(path: Path, task: Task) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix in (".tsv", ".txt") else ",", restval="")
            rows, names = list(reader), [name.strip() for name in reader.fieldnames or []]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CohortError(f"--labels must be a table (.csv or .tsv, UTF-8); {path} cannot be read: {error}.") from error
    positive, negative = task.rules
    wanted = [task.columns.patient, task.columns.slide, positive.column]
    wanted += [negative.column] if negative else []
    wanted += [task.columns.site] if task.columns.site else []
    missing = [name for name in dict.fromkeys(wanted) if name not in names]
    if missing:
        near = [f"{m} (did you mean {c[0]}?)" if (c := get_close_matches(m, names, 1)) else m for m in missing]
        raise CohortError(
            f"{path} must have the columns {', '.join(dict.fromkeys(wanted))} of task {task.name}; it lacks "
            f"{', '.join(near)} and has {', '.join(names) or 'none'}. Rename columns, or name them in the task's YAML."
        )
    return [{(key or "").strip(): value for key, value in row.items() if isinstance(value, str)} for row in rows]


def _check_rows(path: Path, slides: Sequence[Slide], left_out: Sequence[tuple[str, str]], task: Task) -> None:
    counts = Counter([slide.name for slide in slides] + [name for name, _ in left_out])
    if twice := [name for name, n in counts.items() if n > 1]:
        raise CohortError(f"{path} must name each slide once; {_some(twice)} come more than once. Remove the copies.")
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
    if len(labels) < 2:
        only = task.classes[labels.pop()] if labels else "none"
        raise CohortError(
            f"{path} must have patients of both classes by `{task.positive}`; got only: {only}. Check the rule and its "
            "column."
        )


def match_features(
    cohort: Cohort, files: Mapping[str, Path], scales: Sequence[str], skip_missing: bool = False
) -> Cohort:
    """Look at the features of every slide and return the cohort that can be learnt from.

    Slides without tiles are left out and listed; those without a file too, if `skip_missing`.
    Raises: CohortError for missing files, other encoders or widths; BagError for damaged files or missing scales.
    """
    absent = [slide.name for slide in cohort.slides if slide.name not in files]
    if absent and not skip_missing:
        raise CohortError(
            f"every labelled slide must have features; {len(absent)} of {len(cohort.slides)} have none: "
            f"{_some(absent)}.{_ending_hint(absent, files)} Extract them, or leave them out with --skip_missing true."
        )
    left_out = [*cohort.left_out, *((name, "no features file") for name in absent)]
    slides: list[Slide] = []
    encoders: dict[str, str] = {}
    widths: dict[tuple[int, ...], str] = {}
    for slide in cohort.slides:
        if slide.name not in files:
            continue
        file = open_features(files[slide.name])
        check_scales(file.path, file.scales, scales)
        shapes = [file.shape(scale) for scale in scales]
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
    if len({slide.label for slide in slides}) < 2:
        raise CohortError(
            f"both classes must have slides with tiles; {len(slides)} slides are left, of one class. Extract more."
        )
    return Cohort(tuple(slides), tuple(left_out), next(iter(encoders)), next(iter(widths)))


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


def _ending_hint(absent: Sequence[str], files: Mapping[str, Path]) -> str:
    if any(Path(name).stem in files for name in absent):
        return " The table's names carry an ending such as .svs that the files have not."
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
