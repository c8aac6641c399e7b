"""Tile-level tasks: the classes of a set of pictures, how large its pixels are, who a picture is of. YAML, never code.

A task is a file in configs/tasks/tiles/ or any YAML of the same keys. It does not read pictures.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.core.cli import project_files
from mil.data.tasks import METRICS, read_task

TASKS = next((f for f in project_files("configs/tasks/tiles") if f.is_dir()), Path("configs", "tasks", "tiles"))


@dataclass(frozen=True)
class TileColumns:
    """Names of the columns, where pictures come by a table."""

    file: str = "file"
    """Path of the picture, from the table's folder, or from `images` in it."""
    label: str = "label"
    patient: str | None = "patient"
    """Whose the picture is; the column may be absent."""
    split: str | None = "split"
    """train, val (or validation) or test; the column may be absent."""


@dataclass(frozen=True)
class TileTask:
    """The content of a tile task's YAML."""

    name: str
    """Short name; runs are filed under it."""
    classes: tuple[str, ...]
    """Names of the classes; folders of pictures are called so."""
    mpp: float
    """µm/px of the pictures."""
    title: str = ""
    """A sentence for the report."""
    folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further names of a class's folders, or of its labels in a table."""
    patient: str | None = None
    """Regular expression whose first group is, in a file's name, whom the picture is of: patient, or slide where that
    is all the name says. None: each picture is by itself, unless a table says more."""
    columns: TileColumns = field(default_factory=TileColumns)
    folds: int = 5
    """Folds of cross-validation, where no picture is said to be for testing."""
    metrics: tuple[str, ...] = METRICS
    """Which figures the report shows, in this order."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be two or more different names; got {', '.join(self.classes)}.")
        if not self.mpp > 0 or self.folds < 2:
            raise ValueError(f"mpp > 0 and folds >= 2 must hold; got {self.mpp} and {self.folds}.")
        if unknown := [name for name in self.folders if name not in self.classes]:
            raise ValueError(f"folders must be of classes; {', '.join(unknown)} are none.")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"metrics must be some of {', '.join(METRICS)}; got {', '.join(unknown)}.")
        try:
            groups = re.compile(self.patient or "()").groups
        except re.error as error:
            raise ValueError(f"patient must be a regular expression; {self.patient!r}: {error}.") from error
        if groups < 1:
            raise ValueError(f"patient must have a group in brackets, which is the name; got {self.patient!r}.")

    def class_of(self, name: str) -> int | None:
        """Return the class that a folder or label names, or None."""
        known = {other: label for label, own in enumerate(self.classes) for other in (own, *self.folders.get(own, ()))}
        return known.get(name)


def load_tile_task(name: str) -> TileTask:
    """Return the task of that name or YAML file. Raises TaskError naming the nearest, or the wrong key of the file."""
    return read_task(TileTask, TASKS, name)
