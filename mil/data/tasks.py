"""Tasks: which column is the label, which rows are of which class, how patients are divided. YAML, never code.

It reads rules and names; it does not read labels (cohort.py) or features. A task is a file in configs/tasks/ or any
YAML of the same keys.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from engine.core.cli import configured, project_files
from engine.core.documents.tables import clean
from engine.core.errors import ConfigError
from mil.data.values import number, says_nothing, two_readings
from mil.errors import TaskError

TASKS = next((folder for folder in project_files("configs/tasks") if folder.is_dir()), Path("configs", "tasks"))
if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
METRICS = ("auroc", "auprc", "balanced_accuracy", "brier")
_RULE = re.compile(r"\s*(?P<column>.+?)\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<value>.+?)\s*")
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}


@dataclass(frozen=True)
class Rule:
    """`column sign value`, such as `hrd_score >= 42` or `subtype == ILC`. Order needs numbers, equality takes text."""

    column: str
    sign: str
    value: str

    @classmethod
    def read(cls, text: str) -> "Rule":
        """Read a rule. Raises TaskError."""
        found = _RULE.fullmatch(text)
        if found is None:
            raise TaskError(
                f"a rule must read `column sign value` with one of >= <= > < == !=, such as `hrd_score >= 42`; got "
                f"{text!r}. Write it so in the task."
            )
        rule = cls(clean(found["column"]), found["sign"], found["value"].strip("'\""))
        if rule.needs_numbers:
            rule._number(rule.value, "the rule")
        return rule

    @property
    def needs_numbers(self) -> bool:
        return self.sign in _ORDER

    def holds(self, cell: str, where: str) -> bool:
        """Say whether a cell of the column fulfils the rule. Raises TaskError naming `where` for no number, or for a
        text that differs from the rule's only by its case."""
        if self.needs_numbers:
            return _ORDER[self.sign](self._number(cell, where), self._number(self.value, "the rule"))
        cell, value = clean(cell), clean(self.value)
        if cell != value and cell.casefold() == value.casefold():
            raise TaskError(
                f"`{self}` needs one spelling of {value!r}; {where} has {cell!r}. Write them alike, in the table or in "
                "the task."
            )
        same = cell == value or number(cell) == number(value) is not None
        return same == (self.sign == "==")

    def names(self, cell: str) -> bool:
        """Say whether the rule names this very text, so that it means something (`status == None`)."""
        return not self.needs_numbers and clean(cell) == clean(self.value)

    def _number(self, text: str, where: str) -> float:
        value = number(text)
        if value is None:
            either = " or ".join(f"{v:g}" for v in two_readings(text))
            told = f", which may be {either}" if either else ""
            raise TaskError(
                f"{self.column} {self.sign} needs finite numbers; {where} has {text!r}{told}. Correct it, or leave the "
                "cell empty to leave the slide out."
            )
        return value

    def __str__(self) -> str:
        return f"{self.column} {self.sign} {self.value}"


@dataclass(frozen=True)
class Columns:
    """Names of the columns in the table of labels."""

    patient: str = "patient"
    """Whose slide it is: the unit of every split and of every interval."""
    slide: str = "slide"
    """Name of the features file, without its ending."""
    site: str | None = None
    """Where the slide comes from; needed by split.scheme=site."""
    source: str = "source_patient"
    """Of a synthetic slide: the patient it was generated from. The column may be absent when no slide is synthetic."""


@dataclass(frozen=True)
class SplitScheme:
    """How patients are divided."""

    scheme: Literal["patient", "site"] = "patient"
    """patient: stratified by label; site: as well, and no site is on both sides."""
    folds: int = 5
    """Each patient is tested in one of them."""
    repeats: int = 1
    """Times the division is drawn anew."""
    validation: float = 0.2
    """Share of a fold's training patients that stops the training, calibrates and chooses the threshold."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"split.folds must be at least 2; got {self.folds}.")
        if self.repeats < 1:
            raise ValueError(f"split.repeats must be at least 1; got {self.repeats}.")
        if not 0.05 <= self.validation <= 0.5:
            raise ValueError(f"split.validation must lie in 0.05..0.5; got {self.validation}.")


@dataclass(frozen=True)
class Task:
    """What is to be told apart; the content of a task's YAML."""

    name: str
    """Short name; runs are filed under it."""
    positive: str | None = None
    """Of two classes: which rows are positive, `column sign value`."""
    negative: str | None = None
    """Which rows are negative; None takes all others with a value. Rows that are neither are left out, and listed."""
    each: tuple[str, ...] = ()
    """Of three or more classes: which rows are of each, one rule per class, in the order of `classes`. Rows that are of
    none are left out, and listed."""
    title: str = ""
    """A sentence for the report."""
    classes: tuple[str, ...] = ("negative", "positive")
    """What they are called."""
    columns: Columns = field(default_factory=Columns)
    split: SplitScheme = field(default_factory=SplitScheme)
    metrics: tuple[str, ...] = METRICS
    """Which figures the report shows, in this order."""

    def __post_init__(self) -> None:
        unknown = [m for m in self.metrics if m not in METRICS]
        if unknown or not self.metrics:
            raise ValueError(f"metrics must be some of {', '.join(METRICS)}; got {', '.join(unknown) or 'none'}.")
        if (self.positive is None) == (not self.each):
            raise ValueError("a task needs `positive`, for two classes, or `each`, for more; got neither or both.")
        wanted = len(self.each) or 2
        if len(self.classes) != wanted or len(set(self.classes)) != wanted or (self.each and wanted < 3):
            raise ValueError(
                f"classes must be different names, two with `positive`, else one per rule of `each`, at least three; "
                f"got {', '.join(self.classes)} for {wanted}."
            )
        if self.each and self.negative is not None:
            raise ValueError("negative goes with `positive`; `each` has a rule per class. Remove one of them.")
        if self.split.scheme == "site" and self.columns.site is None:
            raise ValueError("split.scheme=site needs columns.site, the name of the column; got none.")

    @property
    def rules(self) -> tuple[tuple[int, Rule], ...]:
        """Return classes with their rules, in the order they are asked. Raises TaskError."""
        if self.positive is None:
            return tuple((label, Rule.read(text)) for label, text in enumerate(self.each))
        negative = () if self.negative is None else ((0, Rule.read(self.negative)),)
        return (1, Rule.read(self.positive)), *negative

    def label(self, row: Mapping[str, str], where: str) -> int | None:
        """Return the number of a row's class, or None for a row that is of none or has no value.

        Text that stands for no value (`mil.values.says_nothing`) is none, unless a rule on its column names it.
        Raises: TaskError; see Rule.holds; for a row that is of two of `each`.
        """
        found: list[int] = []
        for label, rule in self.rules:
            if self._is_blank(rule.column, row[rule.column]):
                return None
            if rule.holds(row[rule.column], where):
                found.append(label)
                if not self.each:
                    return label
        if len(found) > 1:
            named = " and ".join(f"`{self.each[label]}`" for label in found[:2])
            raise TaskError(f"rules of `each` must exclude each other; {where} is of {named}. Correct the task.")
        if found or self.each:
            return found[0] if found else None
        return 0 if self.negative is None else None

    def described(self) -> dict[str, object]:
        """Return the keys, as task.yaml and metrics.json hold them: `each` only where it says something."""
        return {name: value for name, value in asdict(self).items() if name != "each" or value}

    def why_not(self, row: Mapping[str, str]) -> str:
        """Return why `label` is None for a row."""
        cells = {rule.column: row[rule.column] for _, rule in self.rules}
        for column, cell in cells.items():
            if self._is_blank(column, cell):
                return f"no label: {column} is {cell!r}" if clean(cell) else f"no label: {column} is empty"
        said = "of none of the classes" if self.each else "neither positive nor negative"
        return f"{said}: {', '.join(f'{column} is {cell!r}' for column, cell in cells.items())}"

    def _is_blank(self, column: str, cell: str) -> bool:
        named = any(rule.names(cell) for _, rule in self.rules if rule.column == column)
        return not clean(cell) or (says_nothing(cell) and not named)


def load_task(name: str) -> Task:
    """Return the task of that name or YAML file. Raises TaskError naming the nearest, or the wrong key of the file."""
    task = read_task(Task, TASKS, name)
    _ = task.rules
    return task


def read_task(schema: type[T], folder: Path, name: str) -> T:
    """Return the task called so in a folder, or in a YAML file of that path, without a look at its rules.

    Raises: TaskError naming the nearest, or the wrong key of the file.
    """
    path = folder / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        path = next((file for file in (Path(name), *project_files(name)) if file.is_file()), Path(name))
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        near = get_close_matches(name, known, 1, cutoff=0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise TaskError(
            f"--task must be one of {', '.join(known)}, or a YAML file like those in {folder}; got {name!r}.{hint}"
        )
    try:
        return configured(schema, path.resolve())
    except ConfigError as error:
        raise TaskError(str(error)) from error
