"""The report of a cohort for people: one HTML page with every picture, its figures, and what failed.

It does not compute: figures are those of each run's report.json.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from engine.cohort.output import DONE, FAILED, Record
from engine.cohort.picture import RUNS, THUMBNAILS
from engine.core.documents.html import figure, page, paragraph, section, table
from engine.core.files import write_atomically
from engine.evaluation.canvas import AGREEMENT_LIMIT_DB, SEAM_LIMIT
from engine.pipeline.report import PAGE, REPORT

SHOWN = 300
"""Pictures on the page at most: each takes 20 to 40 KB of it."""


def write_page(folder: Path, records: Sequence[Record], facts: Mapping[str, object], bags: bool) -> None:
    """Write report.html. Raises CanvasError if the disk refuses."""
    failed = [r for r in records if r.status == FAILED]
    done = [r for r in records if r.status == DONE]
    what = "bags" if bags else "pictures"
    parts = [
        f"<h1>A cohort of {len(records)} {what}</h1>",
        paragraph(
            f"{len(done)} are done, {len(failed)} failed. All of them are synthetic: for research, never for "
            "diagnosis, and never to test a classifier on.",
            "lead",
        ),  # fmt: skip
        _failures(failed),
        _sheet(folder, done, bags),
        section("Rows", _bag_table(done) if bags else _figures(folder, done)),
        section("This run", table(("what", "value"), [(k, v) for k, v in facts.items()])),
    ]
    write_atomically(folder / PAGE, page("Cohort", *parts).encode())


def _failures(failed: Sequence[Record]) -> str:
    if not failed:
        return ""
    rows = "".join(f"<tr><td>{escape(r.name)}<td>{escape(r.reason)}<td>{escape(r.message)}</tr>" for r in failed)
    style = "<style>.said td{text-align:left;white-space:normal;vertical-align:top}</style>"
    told = f'{style}<table class="said"><tr><th>row<th>reason<th>what to do</tr>{rows}</table>'
    return section("Failures", told, paragraph("Mend them, then run the command with --retry-failed.", "soft"))


def _sheet(folder: Path, done: Sequence[Record], bags: bool) -> str:
    """Return what every row looks like, beside what it was drawn after."""
    if not done:
        return ""
    shown = []
    for record in done[:SHOWN]:
        pictures = [_picture(folder / THUMBNAILS / f"{name}.jpg") for name in (f"{record.name}_reference", record.name)]
        source = f" from {record.source_slide}" if record.source_slide else ""
        label = f", {record.label}" if record.label else ""
        side = "left its source, right " if pictures[0] else ""
        caption = f"{record.name}{label}{source}: {side}{'tiles' if bags else 'seed'} {'' if bags else record.seed}"
        shown.append(figure('<div style="display:flex;gap:4px">' + "".join(pictures) + "</div>", caption, full=bags))
    left = f" The first {SHOWN} of {len(done)}." if len(done) > SHOWN else ""
    how = "The first tiles of each bag, reduced by half." if bags else "Reduced; the files have every px."
    return section("Contact sheet", paragraph(how + left, "soft"), f'<div class="row">{"".join(shown)}</div>')


def _picture(path: Path) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img style="min-width:0;flex:0 1 auto" src="data:image/jpeg;base64,{data}" alt="">'


def _figures(folder: Path, done: Sequence[Record]) -> str:
    """Return the figures of each picture's own report, and what a canvas is held to."""
    rows = []
    for record in done:
        found = _report(folder / RUNS / record.name / REPORT)
        detail = found.get("detail") or {}
        limit = max(SEAM_LIMIT, found.get("seam_control") or 0.0)
        seam, agreement = found.get("seam_score"), found.get("consistency_psnr_db")
        good = (seam is None or seam <= limit) and (agreement is None or agreement >= AGREEMENT_LIMIT_DB)
        values = [_shown(v) for v in (seam, limit, agreement, detail.get("gradient"), detail.get("dark_share"))]
        size = "×".join(map(str, reversed(found.get("size_px", []))))
        rows.append((record.name, record.label, size, *values, "met" if good else "NOT MET", _shown(record.seconds)))
    head = ("picture", "label", "px", "seam score", "at most", f"guide, dB (≥ {AGREEMENT_LIMIT_DB:g})", "gradient",
            "dark share", "limits", "s")  # fmt: skip
    return table(head, rows)


def _bag_table(done: Sequence[Record]) -> str:
    rows = [(r.name, r.label, r.source_slide, r.patches, r.message or "", _shown(r.seconds)) for r in done]
    return table(("bag", "label", "source", "patches drawn in the run that ended it", "note", "s"), rows)


def _report(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # the page is not the place to stop: the picture is there


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
