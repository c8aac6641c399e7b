"""Pictures with classes: a folder per class, or a table; checked, and divided into training, validation and test.

Invariant: a picture has one class, and no patient is on two sides. It reads no pixels.
"""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from engine.core.documents.tables import read_table
from mil.data.values import says_nothing
from mil.errors import CohortError, LeakageError, SplitError
from mil.tiles.tasks import TileTask

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
PARTS = {"train": "train", "training": "train", "val": "validation", "validation": "validation", "test": "test"}
_NEED = 2
"""Groups of each class that a part needs at least."""


@dataclass(frozen=True)
class Picture:
    """One picture of the set."""

    path: Path
    label: int
    patient: str
    """Whose it is; of itself, where nothing says."""
    part: str | None = None
    """train, validation or test, where the set says so."""


@dataclass(frozen=True)
class Division:
    """Rows of the pictures: (n,) each."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def read_pictures(task: TileTask, data: Path, test: Path | None = None) -> list[Picture]:
    """Return the pictures of a folder or table, and those of `test`, all of which are tested; by path.

    Raises: CohortError for a path that holds none, a class nobody knows, or a picture that is named twice.
    """
    found = _read(task, data, "--data")
    if test is not None:
        found = [replace(picture, part=picture.part if picture.part == "validation" else "train") for picture in found]
        found += [replace(picture, part="test") for picture in _read(task, test, "--test")]
    if twice := [str(path) for path, count in Counter(p.path.resolve() for p in found).items() if count > 1]:
        raise CohortError(f"a picture must be named once; {twice[0]} comes more than once. Remove the copies.")
    counts = Counter(picture.label for picture in found)
    if absent := [name for label, name in enumerate(task.classes) if not counts[label]]:
        raise CohortError(f"{data} must hold pictures of all classes of {task.name}; it lacks {', '.join(absent)}.")
    return sorted(found, key=lambda picture: str(picture.path))


def _read(task: TileTask, data: Path, flag: str) -> list[Picture]:
    if data.is_dir():
        return _folder(task, data, flag)
    if data.is_file():
        return _table(task, data, flag)
    raise CohortError(f"{flag} must be a folder of pictures, or a table of them; there is no {data}. Check the path.")


def _folder(task: TileTask, data: Path, flag: str) -> list[Picture]:
    """Read CLASS/… or PART/CLASS/…; folders of other names are refused, for a class would be lost."""
    found: list[Picture] = []
    parts = [(PARTS[p.name.lower()], p) for p in sorted(data.iterdir()) if p.is_dir() and p.name.lower() in PARTS]
    for part, place in parts or [(None, data)]:
        folders = [folder for folder in sorted(place.iterdir()) if folder.is_dir()]
        unknown = [folder.name for folder in folders if task.class_of(folder.name) is None]
        if unknown or not folders:
            raise CohortError(
                f"{flag} must hold one folder per class, {', '.join(task.classes)} (inside train, val, test if it is "
                f"divided); {place} holds {', '.join(unknown[:5]) or 'none'}. Rename them, or name them in the task's "
                "`folders`."
            )
        for folder in folders:
            label = task.class_of(folder.name)
            assert label is not None
            files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in ENDINGS and not p.name.startswith(".")]
            found += [Picture(path, label, _patient(task, path), part) for path in files]
    if not found:
        raise CohortError(f"{flag} must hold pictures ({', '.join(ENDINGS)}); {data} has none.")
    return found


def _patient(task: TileTask, path: Path) -> str:
    if task.patient is None:
        return str(path)
    if (match := re.search(task.patient, path.name)) is None:
        raise CohortError(
            f"{path} must say in its name whose it is, as {task.patient!r}; it does not. Correct the name, or the "
            "task's `patient`."
        )
    return match[1]


def _table(task: TileTask, path: Path, flag: str) -> list[Picture]:
    columns = task.columns
    table = read_table(path, [[columns.file, columns.label]], flag, CohortError)
    if missing := [name for name in (columns.file, columns.label) if name not in table.names]:
        raise CohortError(
            f"{path} must have the columns {columns.file} and {columns.label}; it lacks {', '.join(missing)} and has "
            f"{', '.join(filter(None, table.names))}. Rename columns, or name them in the task's `columns`."
        )
    found = []
    for line, row in table.rows:
        where = f"{path}, line {line}"
        label = task.class_of(row[columns.label])
        if says_nothing(row[columns.file]) or label is None:
            raise CohortError(
                f"{where}: a row needs a file and one of {', '.join(task.classes)}; it has {row[columns.file]!r} and "
                f"{row[columns.label]!r}. Correct it."
            )
        places = [path.parent / row[columns.file], path.parent / "images" / row[columns.file]]
        picture = next((place for place in places if place.is_file()), None)
        if picture is None:
            raise CohortError(f"{where}: {row[columns.file]} must be a picture beside the table; there is none.")
        named = row.get(columns.patient or "", "")
        patient = _patient(task, picture) if says_nothing(named) else named
        found.append(Picture(picture, label, patient, _part(row.get(columns.split or "", ""), where)))
    if not found:
        raise CohortError(f"{path} must have a row per picture; it has none.")
    return found


def _part(cell: str, where: str) -> str | None:
    if says_nothing(cell):
        return None
    if cell.lower() not in PARTS:
        raise CohortError(f"{where}: the split must be one of {', '.join(PARTS)}; got {cell!r}. Correct it.")
    return PARTS[cell.lower()]


def divide(pictures: Sequence[Picture], task: TileTask, validation: float, seed: int) -> list[Division]:
    """Return the set's own division, or folds of cross-validation, patients whole and classes in proportion.

    Raises: LeakageError for a patient on two sides; SplitError for a class with too few patients.
    """
    labels = np.array([p.label for p in pictures])
    groups = np.array([p.patient for p in pictures])
    parts = np.array([p.part or "" for p in pictures])
    if not (parts == "test").any():
        _check_enough(labels, groups, task, task.folds + 1, np.arange(len(labels)))
        return [
            _with_validation(rest, test, labels, groups, parts, validation, seed, task)
            for rest, test in _folds(labels, groups, task.folds, seed)
        ]
    if (parts == "").any():
        bare = pictures[int(np.flatnonzero(parts == "")[0])].path
        raise SplitError(f"all pictures must have a split, or none; {bare} has none. Fill the column.")
    _check_apart(pictures)
    rest, test = np.flatnonzero(parts != "test"), np.flatnonzero(parts == "test")
    _check_enough(labels, groups, task, _NEED, rest)
    return [_with_validation(rest, test, labels, groups, parts, validation, seed, task)]


def _folds(labels: np.ndarray, groups: np.ndarray, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return list(splitter.split(np.zeros(len(labels)), labels, groups))


def _with_validation(
    rest: np.ndarray, test: np.ndarray, labels: np.ndarray, groups: np.ndarray, parts: np.ndarray,
    validation: float, seed: int, task: TileTask,
) -> Division:  # fmt: skip
    """Set a part of the training pictures apart, unless the set does."""
    if (parts[rest] == "validation").any():
        found = Division(rest[parts[rest] != "validation"], rest[parts[rest] == "validation"], test)
    else:
        fewest = min(len(set(groups[rest][labels[rest] == label])) for label in range(len(task.classes)))
        train, held = _folds(labels[rest], groups[rest], max(2, min(round(1 / validation), fewest)), seed)[0]
        found = Division(rest[train], rest[held], test)
    for name, rows in (("train", found.train), ("validation", found.validation), ("test", found.test)):
        if absent := [kind for label, kind in enumerate(task.classes) if label not in labels[rows]]:
            raise SplitError(
                f"every part needs pictures of all classes; {name} has none of {', '.join(absent)}. Use fewer folds, "
                "another --seed, or more pictures."
            )
    return found


def _check_apart(pictures: Sequence[Picture]) -> None:
    seen: dict[str, Picture] = {}
    for picture in pictures:
        other = seen.setdefault(picture.patient, picture)
        if other.part != picture.part:
            raise LeakageError(
                f"a patient must be on one side of a split; {picture.patient} is in {other.part} ({other.path.name}) "
                f"and in {picture.part} ({picture.path.name}). Correct the split; nothing was trained."
            )


def _check_enough(labels: np.ndarray, groups: np.ndarray, task: TileTask, need: int, rows: np.ndarray) -> None:
    for label, name in enumerate(task.classes):
        if (count := len(set(groups[rows][labels[rows] == label]))) < need:
            raise SplitError(
                f"each class needs at least {need} patients (or pictures by themselves) to be divided; {name} has "
                f"{count}. Give more, or use fewer folds."
            )
