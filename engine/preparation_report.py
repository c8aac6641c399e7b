"""What a preparation tells people: of each slide, of each magnification, and some patches to look at.

It does not know how patches are made.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.slide_report import DONE, Record, preview, shown, slide_table, table, write_page_of

SAMPLES = "samples"
_SHOWN = 6
"""Sample patches per magnification on the page."""


@dataclass(frozen=True)
class PreparedRecord(Record):
    """What became of one slide."""

    counts: dict[str, int] = field(default_factory=dict)
    """Patches by magnification."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Patches that were left out because pixels under them are damaged."""
    too_small: list[str] = field(default_factory=list)
    """Magnifications of which one patch is larger than the slide."""
    cells: list[int] | None = None
    """Whole base cells (h, w)."""
    tissue_share: float | None = None
    mpp_x: float | None = None
    mpp_y: float | None = None
    mpp_source: str | None = None
    reader: str | None = None
    seconds: float = 0.0
    """From its plan to its last block; slides overlap."""


def totals(records: Sequence[PreparedRecord], names: Sequence[str]) -> dict[str, int]:
    """Return how many patches there are by magnification."""
    return {name: sum(r.counts.get(name, 0) for r in records if r.status == DONE) for name in names}


def write_page(folder: Path, names: Sequence[str], records: Sequence[PreparedRecord], facts: Mapping[str, Any]) -> None:
    """Write report.html: counts per magnification, sample patches, then all slides with their thumbnails."""
    done = [r for r in records if r.status == DONE]
    counts = totals(records, names)
    rows = []
    for name in names:
        small = sum(name in r.too_small for r in done)
        dropped = sum(r.dropped.get(name, 0) for r in done)
        rows.append((name, shown(counts[name]), shown(len(done) - small), shown(small), shown(dropped)))
    header = ("magnification", "patches", "slides large enough", "slides too small", "left out as damaged")
    values = {r.path: _values(r, names) for r in records}
    parts = ["<h2>Magnifications</h2>", table(header, rows), "<h2>Sample patches</h2>", _samples(folder, names, done)]
    parts += [
        "<h2>Slides</h2>",
        slide_table(folder, (*names, "tissue", "µm/px", "from", "reader", "s"), records, values),
    ]
    write_page_of(folder, "Training set", records, facts, parts)


def _samples(folder: Path, names: Sequence[str], records: Sequence[PreparedRecord]) -> str:
    lines = ["<table>"]
    for name in names:
        there = [f"{SAMPLES}/{name}/{r.slide}.jpg" for r in records]
        pictures = [picture for path in there if (picture := preview(folder, path))][:_SHOWN]
        lines.append(f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{p}</td>" for p in pictures) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _values(r: PreparedRecord, names: Sequence[str]) -> tuple[object, ...]:
    counts = ["too small" if name in r.too_small else r.counts.get(name) for name in names]
    mpp = "" if r.mpp_x is None else f"{r.mpp_x:.4g} × {r.mpp_y:.4g}"
    share = "" if r.tissue_share is None else f"{r.tissue_share:.1%}"
    return (*counts, share, mpp, r.mpp_source, r.reader, r.seconds)
