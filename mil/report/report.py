"""report.html: one page about a study, for a reviewer; every figure is one of metrics.json.

It draws and words; it computes nothing. Pictures are inline, so the file can be sent alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.core.documents import html
from engine.core.files import write_atomically
from mil.data.cohort import Cohort
from mil.data.splits import PARTS, Fold
from mil.fit.metrics import Predictions
from mil.folds.folds import BASELINE, MODEL, SIMLP, joined, read_predictions
from mil.folds.results import pooled
from mil.report import plots
from mil.report.attended import ReadField, attended

NAMES = {"auroc": "AUROC", "auprc": "AUPRC", "balanced_accuracy": "Balanced accuracy", "brier": "Brier score"}
BASELINES = {BASELINE: "mean pool + logistic regression", SIMLP: "SiMLP (mean pool + perceptron)"}


def write_report(
    folder: Path, results: Mapping[str, Any], folds: Sequence[Fold], cohort: Cohort, read: ReadField | None = None
) -> None:
    """Write report.html into a run folder whose folds are done; `read` shows the most attended tiles as pictures."""
    title = results["task"]["title"] or results["task"]["name"]
    parts = [
        _head(title, results),
        html.section("Figures", _summary(results), _difference(results), _per_class(results)),
        html.section("Curves", _curves(folder, results)),
        html.section("Decisions", _confusion(results)),
        html.section("Folds", _folds(results), _fold_plot(results)),
        html.section("Patients per fold", _classes(results)),
        html.section("Most attended tiles", attended(folder, read, _many(results))),
        html.section("The split", _split(folds, cohort)),
        html.section("What was left out", _left_out(results)),
        html.section("How to repeat it", _repeat(folder)),
    ]
    write_atomically(folder / "report.html", html.page(title, *parts).encode())


def interval_text(figure: Mapping[str, float]) -> str:
    low, high = (figure[name] for name in ("low", "high"))
    if low is None or high is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} ({low:.3f} to {high:.3f})"


def _head(title: str, results: Mapping[str, Any]) -> str:
    cohort = results["cohort"]
    classes = ", ".join(f"{count} {name}" for name, count in cohort["classes"].items())
    first = next(iter(results["task"]["metrics"]))
    lead = f"{NAMES[first]} {interval_text(results['pooled'][MODEL][first])}, 95 % interval by bootstrap over patients"
    about = (
        f"{results['model']} on {' + '.join(results['scales'])}: {cohort['patients']} patients ({classes}), "
        f"{cohort['slides']} slides, {cohort['instances']:,} instances. "
        f"Encoder: {cohort['encoder'] or 'not recorded'}. For research, not for diagnosis."
    )
    return f"<h1>{html.escape(title)}</h1>" + html.paragraph(lead, "lead") + html.paragraph(about, "soft")


def _summary(results: Mapping[str, Any]) -> str:
    metrics = results["task"]["metrics"]
    names = {MODEL: results["model"], **BASELINES}
    rows = [[names[who], *(interval_text(told[m]) for m in metrics)] for who, told in results["pooled"].items()]
    note = (
        "Pooled: every patient is judged once per repeat, by the fold that had not seen it; probabilities are "
        "calibrated and thresholds chosen on each fold's validation patients. A lower Brier score is better."
    )
    if _many(results):
        note += (
            " AUROC and AUPRC are means over the classes, each against the rest; balanced accuracy is the mean recall; "
            "the likeliest class is called; the Brier score is summed over classes (0 to 2)."
        )
    return html.table(["", *(NAMES[m] for m in metrics)], rows) + html.paragraph(note, "soft")


def _difference(results: Mapping[str, Any]) -> str:
    said = []
    for who, name in ((BASELINE, "the baseline"), (SIMLP, "SiMLP")):
        if (delta := results.get(f"model_minus_{who}")) is not None:
            value = f", p = {delta['p_value']:.3g}" if delta["p_value"] is not None else ""
            told = f"AUROC of the model minus that of {name}: {interval_text(delta)}{value}"
            said.append(f"{told} (paired bootstrap over patients).")
    return "".join(map(html.paragraph, said))


def _many(results: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of the classes where there are more than two."""
    return results["task"]["classes"] if len(results["task"]["classes"]) > 2 else ()


def _per_class(results: Mapping[str, Any]) -> str:
    if not _many(results):
        return ""
    told = results["per_class"][MODEL]
    rows = [[name, *(interval_text(figure) for figure in figures.values())] for name, figures in told.items()]
    return html.table(["class against the rest", "AUROC", "AUPRC", "recall"], rows)


def _curves(folder: Path, results: Mapping[str, Any]) -> str:
    singles = [read_predictions(folder / "folds" / fold["name"]) for fold in results["folds"]]
    model, baseline = (joined(pooled(folder, who).values()) for who in (MODEL, BASELINE))

    def legend(metric: str) -> dict[str, str]:
        if metric not in results["task"]["metrics"]:
            return {"model": results["model"], "baseline": "mean pool"}
        values = {who: results["pooled"][who][metric]["value"] for who in (MODEL, BASELINE)}
        return {"model": f"{results['model']}, {values[MODEL]:.3f}", "baseline": f"mean pool, {values[BASELINE]:.3f}"}

    if many := _many(results):
        return _curves_per_class(model, many, results["calibration"])
    roc = plots.roc_plot(singles, model, baseline, legend("auroc"))
    precision = plots.pr_plot(singles, model, baseline, legend("auprc"))
    calibration = plots.calibration_plot(results["calibration"], model)
    error = results["calibration"]["expected_calibration_error"]
    figures = [
        html.figure(plots.svg(roc), "ROC: pooled over folds, and each fold."),
        html.figure(plots.svg(precision), "Precision and recall; the dotted line is the share of positives."),
        html.figure(plots.svg(calibration), f"Calibration in bins of equal size (patients above); error {error:.3f}."),
    ]
    return f'<div class="row">{"".join(figures)}</div>'


def _curves_per_class(model: Predictions, classes: Sequence[str], calibration: Mapping[str, Any]) -> str:
    parts = {name: model.against_the_rest(label) for label, name in enumerate(classes)}
    error = calibration["expected_calibration_error"]
    figures = [
        html.figure(plots.svg(plots.class_plot(parts, plots.ROC)), "ROC of each class against the rest, pooled."),
        html.figure(plots.svg(plots.class_plot(parts, plots.PR)), "Precision and recall of each class."),
        html.figure(
            plots.svg(plots.calibration_plot(calibration, model)),
            f"How often the likeliest class is true, in bins of equal size (patients above); error {error:.3f}.",
        ),
    ]
    return f'<div class="row">{"".join(figures)}</div>'


def _confusion(results: Mapping[str, Any]) -> str:
    if many := _many(results):
        rows = [[name, *counts] for name, counts in zip(many, results["confusion"], strict=True)]
        note = "Patients, called by the likeliest class, all repeats together."
        return html.table(["truth", *(f"called {name}" for name in many)], rows) + html.paragraph(note, "soft")
    negative, positive = results["task"]["classes"]
    c = results["confusion"]
    rows = [[positive, c["true_positive"], c["false_negative"]], [negative, c["false_positive"], c["true_negative"]]]
    note = "Patients at each fold's own threshold, all repeats together."
    return html.table(["truth", f"called {positive}", f"called {negative}"], rows) + html.paragraph(note, "soft")


def _folds(results: Mapping[str, Any]) -> str:
    metrics = results["task"]["metrics"]
    rows = [
        [fold["name"], *(interval_text(fold[MODEL][m]) for m in metrics), f"{fold['validation_auroc']:.3f}",
         f"{fold['best_epoch'] + 1} of {fold['epochs']}", _threshold(fold)]
        for fold in results["folds"]
    ]  # fmt: skip
    return html.table(["fold", *(NAMES[m] for m in metrics), "validation AUROC", "epoch kept", "threshold"], rows)


def _threshold(fold: Mapping[str, Any]) -> str:
    return "likeliest" if fold["threshold"] is None else f"{fold['threshold']:.2f}"


def _fold_plot(results: Mapping[str, Any]) -> str:
    if "auroc" not in results["task"]["metrics"]:
        return ""
    rows = [(fold["name"], fold[MODEL]["auroc"], plots.FOLD_COLOUR) for fold in results["folds"]]
    rows.append(("all folds", results["pooled"][MODEL]["auroc"], plots.MODEL_COLOUR))
    rows.append(("mean pool, all folds", results["pooled"][BASELINE]["auroc"], plots.BASELINE_COLOUR))
    if SIMLP in results["pooled"]:
        rows.append(("SiMLP, all folds", results["pooled"][SIMLP]["auroc"], plots.BASELINE_COLOUR))
    drawn = plots.interval_plot(rows, "AUROC with 95 % interval", 0.5)
    return html.figure(plots.svg(drawn), "Few patients make wide intervals; a fold alone says little.", full=True)


def _classes(results: Mapping[str, Any]) -> str:
    order = results["task"]["classes"] if _many(results) else results["task"]["classes"][::-1]
    rows = [
        [fold["name"], *(" / ".join(str(fold["patients"][part][name]) for name in order) for part in PARTS)]
        for fold in results["folds"]
    ]
    return html.table(["fold", *PARTS], rows) + html.paragraph(f"{' / '.join(order)}.", "soft")


def _split(folds: Sequence[Fold], cohort: Cohort) -> str:
    sites = {s.patient: s.site or "" for s in cohort.slides}
    rows = []
    for patient, label in sorted(cohort.labels.items()):
        parts = [next((part for part in PARTS if patient in fold.part(part)), "not used") for fold in folds]
        rows.append([patient, sites[patient], label, *parts])
    head = ["patient", "site", "label", *(fold.name for fold in folds)]
    note = "No patient, and no source patient of a synthetic slide, is on two sides of a fold; the run stops otherwise."
    return html.paragraph(note) + html.folded(f"{len(rows)} patients (also in splits.csv)", html.table(head, rows))


def _left_out(results: Mapping[str, Any]) -> str:
    left_out = results["cohort"]["left_out"]
    extra = f"{results['unlabelled']} features files have no row in the table of labels."
    parts = [html.paragraph(extra if left_out else f"No slide of the table. {extra}")]
    if left_out:
        parts.append(html.folded(f"{len(left_out)} slides", html.table(["slide", "why"], left_out)))
    if renamed := results["cohort"]["renamed"]:
        title = f"{len(renamed)} slides were found under another spelling"
        parts.append(html.folded(title, html.table(["in the table", "features file"], renamed)))
    return "".join(parts)


def _repeat(folder: Path) -> str:
    text = (
        "config.yaml and task.yaml are the settings, splits.csv the split, labels the table as it was, "
        "environment.json versions and command. The same features, settings and versions on the same kind of device "
        "give the same figures."
    )
    again = f"python -m mil.train --config {folder / 'config.yaml'}"
    return html.paragraph(text) + f"<p><code>{html.escape(again)}</code></p>"
