"""report.html: one page about a study, for a reviewer; every figure is one of metrics.json.

It draws and words; it computes nothing. Pictures are inline, so the file can be sent alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.state import write_atomically
from mil import page, plots
from mil.attended import ReadField, attended
from mil.cohort import Cohort
from mil.folds import BASELINE, MODEL, joined, read_predictions
from mil.results import pooled
from mil.splits import PARTS, Fold

NAMES = {"auroc": "AUROC", "auprc": "AUPRC", "balanced_accuracy": "Balanced accuracy", "brier": "Brier score"}


def write_report(
    folder: Path, results: Mapping[str, Any], folds: Sequence[Fold], cohort: Cohort, read: ReadField | None = None
) -> None:
    """Write report.html into a run folder whose folds are done; `read` shows the most attended tiles as pictures."""
    title = results["task"]["title"] or results["task"]["name"]
    parts = [
        _head(title, results),
        page.section("Figures", _summary(results), _difference(results)),
        page.section("Curves", _curves(folder, results)),
        page.section("Decisions", _confusion(results)),
        page.section("Folds", _folds(results), _fold_plot(results)),
        page.section("Patients per fold", _classes(results)),
        page.section("Most attended tiles", attended(folder, read)),
        page.section("The split", _split(folds, cohort)),
        page.section("What was left out", _left_out(results)),
        page.section("How to repeat it", _repeat(folder)),
    ]
    write_atomically(folder / "report.html", page.page(title, *parts).encode())


def _interval(figure: Mapping[str, float]) -> str:
    low, high = (figure[name] for name in ("low", "high"))
    if low is None or high is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} ({low:.3f} to {high:.3f})"


def _head(title: str, results: Mapping[str, Any]) -> str:
    cohort = results["cohort"]
    classes = ", ".join(f"{count} {name}" for name, count in cohort["classes"].items())
    first = next(iter(results["task"]["metrics"]))
    lead = f"{NAMES[first]} {_interval(results['pooled'][MODEL][first])}, 95 % interval by bootstrap over patients"
    about = (
        f"{results['model']} on {' + '.join(results['scales'])}: {cohort['patients']} patients ({classes}), "
        f"{cohort['slides']} slides, {cohort['instances']:,} instances. "
        f"Encoder: {cohort['encoder'] or 'not recorded'}. For research, not for diagnosis."
    )
    return f"<h1>{page.escape(title)}</h1>" + page.paragraph(lead, "lead") + page.paragraph(about, "soft")


def _summary(results: Mapping[str, Any]) -> str:
    metrics = results["task"]["metrics"]
    rows = [
        [f"{results['model']}", *(_interval(results["pooled"][MODEL][m]) for m in metrics)],
        ["mean pool + logistic regression", *(_interval(results["pooled"][BASELINE][m]) for m in metrics)],
    ]
    note = (
        "Pooled: every patient is judged once per repeat, by the fold that had not seen it; probabilities are "
        "calibrated and thresholds chosen on each fold's validation patients. A lower Brier score is better."
    )
    return page.table(["", *(NAMES[m] for m in metrics)], rows) + page.paragraph(note, "soft")


def _difference(results: Mapping[str, Any]) -> str:
    delta = results["model_minus_baseline"]
    return page.paragraph(
        f"AUROC of the model minus that of the baseline: {_interval(delta)}, p = {delta['p_value']:.3g} (paired "
        "bootstrap over patients)."
    )


def _curves(folder: Path, results: Mapping[str, Any]) -> str:
    singles = [read_predictions(folder / "folds" / fold["name"]) for fold in results["folds"]]
    model, baseline = (joined(pooled(folder, who).values()) for who in (MODEL, BASELINE))

    def legend(metric: str) -> dict[str, str]:
        if metric not in results["task"]["metrics"]:
            return {"model": results["model"], "baseline": "mean pool"}
        values = {who: results["pooled"][who][metric]["value"] for who in (MODEL, BASELINE)}
        return {"model": f"{results['model']}, {values[MODEL]:.3f}", "baseline": f"mean pool, {values[BASELINE]:.3f}"}

    roc = plots.roc_plot(singles, model, baseline, legend("auroc"))
    precision = plots.pr_plot(singles, model, baseline, legend("auprc"))
    calibration = plots.calibration_plot(results["calibration"], model)
    error = results["calibration"]["expected_calibration_error"]
    figures = [
        page.figure(plots.svg(roc), "ROC: pooled over folds, and each fold."),
        page.figure(plots.svg(precision), "Precision and recall; the dotted line is the share of positives."),
        page.figure(plots.svg(calibration), f"Calibration in bins of equal size (patients above); error {error:.3f}."),
    ]
    return f'<div class="row">{"".join(figures)}</div>'


def _confusion(results: Mapping[str, Any]) -> str:
    negative, positive = results["task"]["classes"]
    c = results["confusion"]
    rows = [[positive, c["true_positive"], c["false_negative"]], [negative, c["false_positive"], c["true_negative"]]]
    note = "Patients at each fold's own threshold, all repeats together."
    return page.table(["truth", f"called {positive}", f"called {negative}"], rows) + page.paragraph(note, "soft")


def _folds(results: Mapping[str, Any]) -> str:
    metrics = results["task"]["metrics"]
    rows = [
        [fold["name"], *(_interval(fold[MODEL][m]) for m in metrics), f"{fold['validation_auroc']:.3f}",
         f"{fold['best_epoch'] + 1} of {fold['epochs']}", f"{fold['threshold']:.2f}"]
        for fold in results["folds"]
    ]  # fmt: skip
    return page.table(["fold", *(NAMES[m] for m in metrics), "validation AUROC", "epoch kept", "threshold"], rows)


def _fold_plot(results: Mapping[str, Any]) -> str:
    if "auroc" not in results["task"]["metrics"]:
        return ""
    rows = [(fold["name"], fold[MODEL]["auroc"], plots.FOLD_COLOUR) for fold in results["folds"]]
    rows.append(("all folds", results["pooled"][MODEL]["auroc"], plots.MODEL_COLOUR))
    rows.append(("mean pool, all folds", results["pooled"][BASELINE]["auroc"], plots.BASELINE_COLOUR))
    drawn = plots.interval_plot(rows, "AUROC with 95 % interval", 0.5)
    return page.figure(plots.svg(drawn), "Few patients make wide intervals; a fold alone says little.", full=True)


def _classes(results: Mapping[str, Any]) -> str:
    negative, positive = results["task"]["classes"]
    rows = [
        [fold["name"], *(f"{fold['patients'][part][positive]} / {fold['patients'][part][negative]}" for part in PARTS)]
        for fold in results["folds"]
    ]
    return page.table(["fold", *PARTS], rows) + page.paragraph(f"{positive} / {negative}.", "soft")


def _split(folds: Sequence[Fold], cohort: Cohort) -> str:
    sites = {s.patient: s.site or "" for s in cohort.slides}
    rows = []
    for patient, label in sorted(cohort.labels.items()):
        parts = [next((part for part in PARTS if patient in fold.part(part)), "not used") for fold in folds]
        rows.append([patient, sites[patient], label, *parts])
    head = ["patient", "site", "label", *(fold.name for fold in folds)]
    note = "No patient, and no source patient of a synthetic slide, is on two sides of a fold; the run stops otherwise."
    return page.paragraph(note) + page.folded(f"{len(rows)} patients (also in splits.csv)", page.table(head, rows))


def _left_out(results: Mapping[str, Any]) -> str:
    left_out = results["cohort"]["left_out"]
    extra = f"{results['unlabelled']} features files have no row in the table of labels."
    if not left_out:
        return page.paragraph(f"No labelled slide. {extra}")
    return page.paragraph(extra) + page.folded(f"{len(left_out)} slides", page.table(["slide", "why"], left_out))


def _repeat(folder: Path) -> str:
    text = (
        "config.yaml and task.yaml are the settings, splits.csv the split, labels the table as it was, "
        "environment.json versions and command. The same features, settings and versions on the same kind of device "
        "give the same figures."
    )
    again = f"python -m mil.train --config {folder / 'config.yaml'}"
    return page.paragraph(text) + f"<p><code>{page.escape(again)}</code></p>"
