"""The comparison for people: one HTML page that needs no network, with crops beside each other as stored px.

It does not compute. Crops are PNG: a page that compresses them again would hide what is judged.
"""

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
import PIL.Image

from engine.evaluation.compare import Comparison, shown_pairs
from engine.evaluation.measures.figures import Figure
from engine.pipeline.report import table

_STYLE = """body{font:14px/1.45 sans-serif;margin:2em auto;max-width:1160px;color:#222;background:#fff}
table{border-collapse:collapse;margin:.6em 0}th{background:#eee}th,td{border:1px solid #ccc;padding:3px 8px;
text-align:left}h1{font-size:22px}h2{font-size:17px;margin-top:1.6em}.soft{color:#666}p{margin:.4em 0}
.row{display:flex;flex-wrap:wrap;gap:4px}.row img{width:256px;height:256px}
.warn{background:#fff3cd;padding:6px}"""


def page_of(found: Comparison) -> str:
    """Return the page."""
    against = f" against {found.config.b}" if found.config.b else ""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Quality</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(found.config.a + against)}</h1>",
        *(f"<p class=warn>{html.escape(w)}</p>" for w in found.warnings),
        _table(found),
        _verdicts(found),
        _figures(found.figures),
        _detail(found),
        _canvases(found),
        "<h2>Crops beside each other</h2>",
        "<p class=soft>As stored, 256 px each. Look at them: a number can hide a bad picture.</p>",
        *(_row(name, crops) for name, crops in shown_pairs(found)),
        "<h2>What the figures are of</h2>",
        table(("what", "value"), [(k, str(v)) for k, v in found.facts.items()]),
    ]
    if found.unusable:
        parts += ["<h2>Not used</h2>", table(("file", "reason", "what to do"), [tuple(u) for u in found.unusable])]
    return "\n".join([*(part for part in parts if part), "</html>\n"])


def number(value: float | None) -> str:
    """Return a figure as people read it; — where there is none."""
    if value is None or math.isnan(value):
        return "—"
    return f"{value:.4g}"


def _table(found: Comparison) -> str:
    if not found.table:
        return ""
    head = ("figure", "value", "n of A", "n of B", "floor", "how")
    rows = [(r.what, number(r.value), str(r.n_a), str(r.n_b), number(r.floor), r.how) for r in found.table]
    return f"<h2>Protocol {found.config.protocol}</h2>" + table(head, rows)


def _verdicts(found: Comparison) -> str:
    if not found.verdicts:
        return ""
    words = {True: "met", False: "NOT MET", None: "cannot be said"}
    rows = [(v.name, number(v.value), v.limit, words[v.met]) for v in found.verdicts]
    return "<h2>What a canvas is held to</h2>" + table(("figure", "value", "limit", ""), rows)


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    head = ("figure", "A against B", "95 %", "A at floor's n", "floor", "ceiling (blurred)", "better", "n", "note")
    rows = []
    for f in figures:
        span = "" if f.low is None else f"{number(f.low)} … {number(f.high)}"
        values = [number(v) for v in (f.at_floor_n, f.floor, f.ceiling)]
        rows.append(
            (
                f.name,
                number(f.value),
                span,
                *values,
                f.better,
                f"{f.n_a}, {f.n_b}" + (f"; floor {f.floor_n}" if f.floor_n else ""),
                f.note,
            )
        )
    return "<h2>Two sets of crops</h2>" + table(head, rows)


def _detail(found: Comparison) -> str:
    columns = []
    if found.detail:
        columns += [("A", found.detail["a"]), ("B", found.detail["b"])]
    if found.patches:
        detail = found.patches["detail"]
        columns += [("canvas' cells", detail["canvas"]), ("single patches", detail["patches"])]
    if not columns:
        return ""
    names = ("tissue_share", "gradient", "dark_share")
    rows = [(name, *(number(values[name]) for _, values in columns)) for name in names]
    for key, title in (
        ("energy", "energy at {} px"),
        ("grid_share", "grid of {} px"),
        ("edge_ratio", "edges of {} px"),
    ):
        pitches = columns[0][1][key]
        rows += [(title.format(p), *(number(values[key][p]) for _, values in columns)) for p in pitches]
    said = found.detail.get("flags", []) if found.detail else []
    lines = [f"<p>A relative to B: {html.escape('; '.join(said) or 'nothing flagged')}.</p>"] if found.detail else []
    if found.patches:
        said = found.patches["detail"]["flags"]
        lines.append(
            f"<p>Canvas relative to {found.patches['n']} single patches ({html.escape(found.patches['drawn'])}): "
            f"{html.escape('; '.join(said) or 'nothing flagged')}.</p>"
        )
    return "<h2>Detail of tissue</h2>" + "".join(lines) + table(("", *(name for name, _ in columns)), rows)


def _canvases(found: Comparison) -> str:
    if not found.canvases:
        return ""
    rows = []
    for c in found.canvases:
        similarity = (
            c.note if c.similarity is None else f"{number(c.similarity.value)} (any: {number(c.similarity.floor)})"
        )
        figures = (c.seam_score, c.seam_control, c.consistency_psnr_db, c.detail.gradient, c.detail.dark_share)
        rows.append((c.run, *(number(v) for v in figures), similarity))
    head = (
        "run",
        "seam score",
        "off the borders",
        "agreement, dB",
        "gradient",
        "dark share",
        "similarity to conditions",
    )
    return "<h2>Canvases</h2>" + table(head, rows)


def _row(name: str, crops: np.ndarray) -> str:
    images = []
    for crop in crops:
        data = io.BytesIO()
        PIL.Image.fromarray(np.ascontiguousarray(crop.transpose(1, 2, 0))).save(data, "PNG")
        images.append(f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">')
    return f"<p>{html.escape(name)}</p><div class=row>{''.join(images)}</div>"
