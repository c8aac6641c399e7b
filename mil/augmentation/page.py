"""What a protocol leaves for people: metrics.json, one table (csv, txt), one plot, report.html. It computes nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from engine.core.documents import html
from engine.core.files import write_atomically
from mil.augmentation.config import ARMS
from mil.augmentation.figures import NAMES, as_csv, as_text, kept_sentence, table_rows
from mil.report import plots

COLOURS = {"real": "#4b5560", "real_twice": "#c46a1b", "real_noise": "#d9a441", "real_synthetic": "#1f5fa8",
           "synthetic": "#7fb0dd"}  # fmt: skip
ABOUT = (
    "All arms of a fold and a fraction share real training patients, validation and test patients, seed and settings; "
    "they differ in the bags that are learnt from. Synthetic bags come from the arm's own training patients, inherit "
    "their label, and are never validated or tested on. Real twice shows what more steps do, feature noise what any "
    "disturbance does: synthetic data must beat both. Differences are paired: both arms are drawn the same patients."
)


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write everything into the run folder. Raises CanvasError if the disk refuses."""
    picture = plots.svg(arms_plot(results))
    files = {
        "metrics.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "augmentation.csv": as_csv(results),
        "augmentation.txt": as_text(results),
        "report.html": page(results, picture, folder),
    }
    for name, text in files.items():
        write_atomically(folder / name, text.encode())
    write_atomically(folder / "augmentation.png", plots.png(arms_plot(results)))


def page(results: Mapping[str, Any], picture: str, folder: Path) -> str:
    """Return the report."""
    title = f"Augmentation: {results['task']['title'] or results['task']['name']}"
    about = (
        f"{results['model']} on {' + '.join(results['scales'])}, {results['patients']} real patients, "
        f"{results['folds']} folds. Encoder: {results['encoder'] or 'not recorded'}. For research, not for diagnosis."
    )
    head, rows = table_rows(results)
    said = [text for text in (results["generator"]["sentence"], kept_sentence(results)) if text]
    again = f"python -m mil.augment --config {folder / 'config.yaml'}"
    return html.page(
        title,
        f"<h1>{html.escape(title)}</h1>" + html.paragraph(verdict(results), "lead") + html.paragraph(about, "soft"),
        html.section("The generator", *(html.paragraph(text[0].upper() + text[1:] + ".") for text in said)),
        html.section("Arms", html.figure(picture, "AUROC with 95 % interval over patients.", full=True),
                     html.table([*head[1:2], *head[:1], *head[2:]], [[r[1], r[0], *r[2:]] for r in rows]),
                     html.paragraph(ABOUT, "soft")),
        html.section("How to repeat it", f"<p><code>{html.escape(again)}</code></p>"),
    )  # fmt: skip


def verdict(results: Mapping[str, Any]) -> str:
    """Say for each fraction above and below which other arms with real bags real + synthetic is."""
    said = []
    for fraction in sorted({row["fraction"] for row in results["arms"]}):
        rows = {row["arm"]: row for row in results["arms"] if row["fraction"] == fraction}
        deltas = {arm: rows[arm].get("real_synthetic_minus_this") for arm in ARMS[:3] if arm in rows}
        if "real_synthetic" not in rows or not deltas:
            continue
        above = [NAMES[arm] for arm, d in deltas.items() if d is not None and d["low"] is not None and d["low"] > 0]
        below = [NAMES[arm] for arm, d in deltas.items() if d is not None and d["high"] is not None and d["high"] < 0]
        text = f"At a fraction of {fraction:g}, real + synthetic is above "
        text += ", ".join(above) if above else "no other arm with real bags"
        if above and len(above) < len(deltas):
            text += " alone"
        said.append(text + (f", and below {', '.join(below)}." if below else "."))
    return " ".join(said) or "No arm with synthetic bags was trained."


def arms_plot(results: Mapping[str, Any]) -> Figure:
    """Draw the AUROC of each arm, fraction by fraction."""
    metric = "auroc" if "auroc" in results["task"]["metrics"] else results["task"]["metrics"][0]
    fractions = sorted({row["fraction"] for row in results["arms"]})
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in results["arms"])]
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for row in results["arms"]:
            value = row[metric]
            x = fractions.index(row["fraction"]) + (arms.index(row["arm"]) - (len(arms) - 1) / 2) * 0.14
            colour = COLOURS[row["arm"]]
            label = NAMES[row["arm"]] if row["fraction"] == fractions[0] else None
            if value["low"] is not None:
                axes.plot([x, x], [value["low"], value["high"]], color=colour, lw=1.6)
            axes.plot(x, value["value"], "o", color=colour, ms=5, label=label)
        if metric == "auroc":
            axes.axhline(0.5, color="#9aa3ab", lw=0.8, ls=":")
        axes.set_xticks(range(len(fractions)), [f"{fraction:g}" for fraction in fractions])
        axes.set(xlabel="fraction of the training patients", ylabel="AUROC" if metric == "auroc" else metric)
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure
