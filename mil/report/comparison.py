"""Which of several studies tells the classes apart best, on the same patients: paired differences of AUROC.

Runs must have judged the same patients with the same labels; how they were made is their own affair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mil.errors import RunError
from mil.fit.metrics import FIGURES, RESAMPLES, Interval, Predictions, difference, interval
from mil.folds.folds import BASELINE
from mil.folds.results import pooled
from mil.report import plots


@dataclass(frozen=True)
class Contender:
    """The tested patients of one run (or of its baseline), by repeat."""

    name: str
    found: Mapping[int, Predictions]


@dataclass(frozen=True)
class Pair:
    """The first one's AUROC minus the second one's."""

    first: str
    second: str
    delta: Interval
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """Figures of all contenders, best first, and all their differences."""

    figures: dict[str, dict[str, Interval]]
    pairs: tuple[Pair, ...]
    patients: int

    def as_json(self) -> dict[str, Any]:
        return {
            "patients": self.patients,
            "bootstrap": {"unit": "patient", "resamples": RESAMPLES, "level": 0.95},
            "figures": {name: {k: asdict(v) for k, v in row.items()} for name, row in self.figures.items()},
            "auroc_differences": [
                {"first": p.first, "second": p.second, **asdict(p.delta), "p_value": p.p_value} for p in self.pairs
            ],
        }


def contenders(runs: Sequence[Path], baseline: bool = True) -> list[Contender]:
    """Read the runs, named as briefly as tells them apart; `baseline` adds that of the first run. Raises RunError."""
    names = _names(runs)
    found = []
    for name, run in zip(names, runs, strict=True):
        predictions = pooled(run)
        if not predictions:
            raise RunError(f"{run} must be a finished run of mil.train; it has no folds. Check the path.")
        found.append(Contender(name, predictions))
    if baseline:
        found.append(Contender(f"{names[0]}: mean pool", pooled(runs[0], BASELINE)))
    for other in found[1:]:
        _check_same(found[0], other)
    return found


def _names(runs: Sequence[Path]) -> list[str]:
    resolved = [run.resolve() for run in runs]
    if len(set(resolved)) < len(runs):
        raise RunError(f"runs must be different folders; got {', '.join(map(str, runs))}. Name each once.")
    depth = 1
    while len({r.parts[-depth:] for r in resolved}) < len(runs):
        depth += 1
    return ["/".join(r.parts[-depth:]) for r in resolved]


def _truth(contender: Contender) -> dict[str, int]:
    return {
        patient: int(label)
        for found in contender.found.values()
        for patient, label in zip(found.patients, found.labels, strict=True)
    }


def _check_same(first: Contender, other: Contender) -> None:
    ours, theirs = _truth(first), _truth(other)
    odd = sorted(ours.keys() ^ theirs.keys()) or sorted(p for p in ours if ours[p] != theirs[p])
    if odd:
        raise RunError(
            f"runs must have tested the same patients with the same labels; {first.name} and {other.name} differ in "
            f"{len(odd)}, such as {odd[0]}. Train them on one table, with --splits of one run."
        )


def compare(found: Sequence[Contender], seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """Return all figures and paired differences, each with its 95 % interval."""
    figures = {
        c.name: {name: interval(figure, c.found, seed, resamples) for name, figure in FIGURES.items()} for c in found
    }
    order = sorted(found, key=lambda c: -figures[c.name]["auroc"].value)
    pairs = []
    for at, first in enumerate(order):
        for second in order[at + 1 :]:
            delta, p_value = difference(FIGURES["auroc"], first.found, second.found, seed, resamples)
            pairs.append(Pair(first.name, second.name, delta, p_value))
    return Comparison({c.name: figures[c.name] for c in order}, tuple(pairs), len(_truth(found[0])))


def comparison_table(result: Comparison) -> str:
    """Return both tables as text."""
    width = max(len(name) for name in [*result.figures, *(f"{p.first} - {p.second}" for p in result.pairs)])
    lines = [f"{result.patients} patients; 95 % intervals by bootstrap over patients", ""]
    lines.append(f"{'':{width}}  {'AUROC':24}  {'AUPRC':24}  {'balanced accuracy':24}  Brier score")
    for name, row in result.figures.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{row[metric]!s:24}" for metric in FIGURES).rstrip())
    lines += ["", f"{'difference of AUROC':{width}}  {'':24}  p"]
    lines += [f"{f'{p.first} - {p.second}':{width}}  {p.delta!s:24}  {p.p_value:.4f}" for p in result.pairs]
    return "\n".join(lines) + "\n"


def comparison_plot(result: Comparison) -> Figure:
    """Draw the AUROC of each, and below it each difference from the best."""
    best = next(iter(result.figures))
    rows = [
        (name, asdict(row["auroc"]), plots.MODEL_COLOUR if name == best else plots.BASELINE_COLOUR)
        for name, row in result.figures.items()
    ]
    return plots.interval_plot(rows, f"AUROC with 95 % interval, {result.patients} patients", 0.5)


def difference_plot(result: Comparison) -> Figure:
    """Draw every paired difference; an interval that crosses the line is no difference."""
    rows = [(f"{p.first} − {p.second}", asdict(p.delta), plots.MODEL_COLOUR) for p in result.pairs]
    return plots.interval_plot(rows, "difference of AUROC with 95 % interval (paired)", 0.0)
