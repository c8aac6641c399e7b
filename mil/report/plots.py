"""The plots of reports and comparisons, as SVG text or PNG bytes; drawn by matplotlib without a display.

Every curve is labelled in words, and colours differ in lightness too. It reads and writes no files.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mil.fit.metrics import Predictions

MODEL_COLOUR, BASELINE_COLOUR, FOLD_COLOUR = "#1f5fa8", "#c46a1b", "#a9c3de"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b6570",
    "axes.labelcolor": "#2b333b",
    "svg.hashsalt": "mil",
    "svg.fonttype": "path",
}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def svg(figure: Figure) -> str:
    """Return the figure as an <svg> element; the same figure gives the same text."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg") :]


def png(figure: Figure, dpi: int = 130) -> bytes:
    """Return the figure as PNG."""
    data = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(data, format="png", dpi=dpi)
    return data.getvalue()


def roc_points(found: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return false and true positive rates, from (0, 0) to (1, 1)."""
    order = np.argsort(-found.probability, kind="stable")
    last = np.append(np.diff(-found.probability[order]) != 0, True)  # ties are one step
    hits, misses = np.cumsum(found.labels[order])[last], np.cumsum(1 - found.labels[order])[last]
    return np.append(0, misses / misses[-1]), np.append(0, hits / hits[-1])


def pr_points(found: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision, from high thresholds to low."""
    order = np.argsort(-found.probability, kind="stable")
    last = np.append(np.diff(-found.probability[order]) != 0, True)
    hits = np.cumsum(found.labels[order])[last]
    return hits / hits[-1], hits / (np.flatnonzero(last) + 1)


Curve = Callable[[Predictions], tuple[np.ndarray, np.ndarray]]


def _curves(
    curve: Curve, chance: Sequence[float], folds: Sequence[Predictions],
    model: Predictions, baseline: Predictions, legend: Mapping[str, str],
) -> tuple[Figure, Axes]:  # fmt: skip
    """Draw one kind of curve of each fold, of all, and of the baseline; `chance` is the dotted line."""
    figure, axes = _figure(4.0, 3.8)
    axes.plot([0, 1], chance, color="#9aa3ab", lw=0.8, ls=":")
    for i, fold in enumerate(folds):
        axes.plot(*curve(fold), color=FOLD_COLOUR, lw=1, label="single folds" if i == 0 else None)
    axes.plot(*curve(baseline), color=BASELINE_COLOUR, lw=1.6, ls="--", label=legend["baseline"])
    axes.plot(*curve(model), color=MODEL_COLOUR, lw=2.2, label=legend["model"])
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
    return figure, axes


def roc_plot(
    folds: Sequence[Predictions], model: Predictions, baseline: Predictions, legend: Mapping[str, str]
) -> Figure:
    """Draw the ROC of each fold, of all, and of the baseline."""
    with mpl.rc_context(STYLE):
        figure, axes = _curves(roc_points, (0, 1), folds, model, baseline, legend)
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        axes.legend(loc="lower right", frameon=False, fontsize=7.5)
    return figure


def pr_plot(
    folds: Sequence[Predictions], model: Predictions, baseline: Predictions, legend: Mapping[str, str]
) -> Figure:
    """Draw precision against recall; the dotted line is the share of positives."""
    share = float(model.labels.mean())
    with mpl.rc_context(STYLE):
        figure, axes = _curves(pr_points, (share, share), folds, model, baseline, legend)
        axes.set(xlabel="recall", ylabel="precision")
        axes.legend(loc="lower left", frameon=False, fontsize=7.5)
    return figure


ROC = (roc_points, "false positive rate", "true positive rate")
PR = (pr_points, "recall", "precision")
"""Kinds of curves with the names of their axes."""


def class_plot(parts: Mapping[str, Predictions], kind: tuple[Curve, str, str]) -> Figure:
    """Draw one curve for each class against the rest."""
    curve, x, y = kind
    with mpl.rc_context(STYLE):
        figure, axes = _figure(4.0, 3.8)
        colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(parts)))
        for (name, found), colour, dash in zip(parts.items(), colours, cycle(("-", "--", "-.", ":")), strict=False):
            axes.plot(*curve(found), color=colour, lw=1.6, ls=dash, label=name)
        if curve is roc_points:
            axes.plot([0, 1], [0, 1], color="#9aa3ab", lw=0.8, ls=":")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=x, ylabel=y)
        axes.set_aspect("equal")
        axes.legend(loc="lower right" if curve is roc_points else "lower left", frameon=False, fontsize=7.5)
    return figure


def calibration_plot(calibration: Mapping[str, Any], found: Predictions) -> Figure:
    """Draw observed shares against predicted probabilities, and where the patients lie."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.0, 3.8), layout="constrained")
        axes, counts = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        bins = calibration["bins"]
        axes.plot([0, 1], [0, 1], color="#9aa3ab", lw=0.8, ls=":")
        x, y = [b["predicted"] for b in bins], [b["observed"] for b in bins]
        axes.plot(x, y, color=MODEL_COLOUR, marker="o", ms=5, lw=1.6)
        for b in bins:
            axes.annotate(str(b["patients"]), (b["predicted"], b["observed"]), (0, 6), textcoords="offset points",
                          ha="center", fontsize=7, color="#5b6570")  # fmt: skip
        binary = found.classes == 2
        axes.set(
            ylabel="share positive" if binary else "share true",
            xlim=(-0.02, 1.02),
            ylim=(-0.05, 1.12),
            yticks=np.linspace(0, 1, 6),
        )
        edges = np.linspace(0, 1, 21).tolist()
        shown = found.probability if binary else found.probability.max(axis=1)
        truth = found.labels if binary else (found.labels == found.called).astype(int)
        groups, names = [shown[truth == label] for label in (0, 1)], ["negative", "positive"]
        names = names if binary else ["called wrongly", "called rightly"]
        counts.hist(groups, bins=edges, stacked=True, color=[FOLD_COLOUR, MODEL_COLOUR], label=names)
        counts.set(xlabel="predicted probability", ylabel="patients")
        axes.legend(*counts.get_legend_handles_labels(), frameon=False, fontsize=7.5, loc="upper left")
    return figure


def interval_plot(rows: Sequence[tuple[str, Mapping[str, float], str]], label: str, reference: float | None) -> Figure:
    """Draw figures with their intervals, one row each (name, value/low/high, colour), top to bottom."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(6.4, 0.7 + 0.27 * len(rows))
        for i, (_, figure_of, colour) in enumerate(rows):
            axes.plot([figure_of["low"], figure_of["high"]], [i, i], color=colour, lw=1.6, solid_capstyle="butt")
            axes.plot(figure_of["value"], i, "o", color=colour, ms=5)
        if reference is not None:
            axes.axvline(reference, color="#9aa3ab", lw=0.8, ls=":")
        axes.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    return figure
