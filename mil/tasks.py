"""Tasks: which column is the label, which rows are positive, how patients are divided. YAML, never code.

It reads rules and names; it does not read labels (cohort.py) or features. A task is a file in configs/tasks/ or any
YAML of the same keys.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from engine.arguments import PROJECT_ROOT, parse
from mil.errors import TaskError

TASKS = PROJECT_ROOT / "configs" / "tasks"
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
        rule = cls(found["column"], found["sign"], found["value"].strip("'\""))
        if rule.sign in _ORDER:
            rule._number(rule.value, "the rule")
        return rule

    def holds(self, cell: str, where: str) -> bool:
        """Say whether a cell of the column fulfils the rule. Raises TaskError naming `where` for no number."""
        if self.sign in _ORDER:
            return _ORDER[self.sign](self._number(cell, where), float(self.value))
        same = cell == self.value or _as_number(cell) == _as_number(self.value) is not None
        return same == (self.sign == "==")

    def _number(self, text: str, where: str) -> float:
        number = _as_number(text)
        if number is None:
            raise TaskError(
                f"{self.column} {self.sign} needs numbers; {where} has {text!r}. Correct it, or leave the cell empty "
                "to leave the slide out."
            )
        return number

    def __str__(self) -> str:
        return f"{self.column} {self.sign} {self.value}"


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if number != number else number


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
    positive: str
    """Which rows are positive: `column sign value`."""
    negative: str | None = None
    """Which rows are negative; None takes all the others. Rows that are neither are left out, and listed."""
    title: str = ""
    """A sentence for the report."""
    classes: tuple[str, str] = ("negative", "positive")
    """What the two are called."""
    columns: Columns = field(default_factory=Columns)
    split: SplitScheme = field(default_factory=SplitScheme)
    metrics: tuple[str, ...] = METRICS
    """Which figures the report shows, in this order."""

    def __post_init__(self) -> None:
        unknown = [m for m in self.metrics if m not in METRICS]
        if unknown or not self.metrics:
            raise ValueError(f"metrics must be some of {', '.join(METRICS)}; got {', '.join(unknown) or 'none'}.")
        if self.split.scheme == "site" and self.columns.site is None:
            raise ValueError("split.scheme=site needs columns.site, the name of the column; got none.")

    @property
    def rules(self) -> tuple[Rule, Rule | None]:
        """Return the rules for positive and negative. Raises TaskError."""
        return Rule.read(self.positive), None if self.negative is None else Rule.read(self.negative)

    def label(self, row: Mapping[str, str], where: str) -> int | None:
        """Return 1, 0, or None for a row that is neither or has no value. Raises TaskError for no number."""
        positive, negative = self.rules
        for rule, label in ((positive, 1), (negative, 0)):
            if rule is None:
                return 0
            if not row[rule.column].strip():
                return None
            if rule.holds(row[rule.column].strip(), where):
                return label
        return None


def load_task(name: str) -> Task:
    """Return the task of that name or YAML file. Raises TaskError naming the nearest; wrong keys exit with 2."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else TASKS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in TASKS.glob("*.yaml"))
        near = get_close_matches(name, known, 1, cutoff=0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise TaskError(
            f"--task must be one of {', '.join(known)}, or a YAML file like those in {TASKS}; got {name!r}.{hint}"
        )
    task = parse(["--config", str(path.resolve())], Task, f"task {name}", "")
    _ = task.rules
    return task
