"""report.html of a probe: one page; every figure is one of metrics.json. It computes nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.documents import html
from engine.core.files import write_atomically
from mil.fit.metrics import Predictions
from mil.report import plots
from mil.report.report import NAMES, interval_text


def write_page(folder: Path, results: Mapping[str, Any], told: Mapping[str, Predictions]) -> None:
    """Write report.html. Raises CanvasError if the disk refuses."""
    title = results["task"]["title"] or results["task"]["name"]
    metrics, classes = results["task"]["metrics"], results["task"]["classes"]
    rows = [[name, *(interval_text(of["figures"][m]) for m in metrics)] for name, of in results["probes"].items()]
    how = "cross-validation" if results["divisions"] > 1 else "the set's own division"
    about = (
        f"Vectors of {results['encoder']} ({results['width']} numbers), {results['pictures']} pictures, "
        f"{results['tested']} tested ({how}). For research, not for diagnosis."
    )
    note = (
        "95 % intervals by bootstrap over patients, or over pictures where nothing says whose they are. AUROC and "
        "AUPRC are means over classes, each against the rest; balanced accuracy is the mean recall."
    )
    parts = [
        f"<h1>{html.escape(title)}</h1>" + html.paragraph(about, "soft"),
        html.section("Figures", html.table(["", *(NAMES[m] for m in metrics)], rows), html.paragraph(note, "soft")),
    ]
    for name, of in results["probes"].items():
        table = [[kind, *(interval_text(f) for f in figures.values())] for kind, figures in of["per_class"].items()]
        counts = [[kind, *row] for kind, row in zip(classes, of["confusion"], strict=True)]
        curves = {kind: told[name].against_the_rest(label) for label, kind in enumerate(classes)}
        parts.append(
            html.section(
                name[0].upper() + name[1:],
                html.figure(plots.svg(plots.class_plot(curves, plots.ROC)), "ROC of each class against the rest."),
                html.table(["class against the rest", "AUROC", "AUPRC", "recall"], table),
                html.table(["truth", *(f"called {kind}" for kind in classes)], counts),
            )
        )
    write_atomically(folder / "report.html", html.page(title, *parts).encode())
