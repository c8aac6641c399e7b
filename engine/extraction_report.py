"""What an extraction tells people: report.json, and report.html of the same facts as one page that needs no network.

It does not know how features are made. A slide that an earlier run did keeps its record.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from engine.errors import UNREADABLE, CanvasError
from engine.state import write_atomically

REPORT, PAGE = "report.json", "report.html"
PREVIEW_PX = 160
DONE, FAILED = "done", "failed"
_STYLE = """body{font:14px/1.4 sans-serif;margin:2em;color:#222;background:#fff}
table{border-collapse:collapse;margin:1em 0}
th,td{border:1px solid #ccc;padding:4px 8px;text-align:left;vertical-align:top}th{background:#eee}
.failed{background:#fdd}.number{text-align:right}img{display:block;max-width:160px}"""


@dataclass(frozen=True)
class SlideRecord:
    """What became of one slide."""

    slide: str
    path: str
    status: str
    """done or failed."""
    code: str = ""
    """Reason of a failure in one word; of a slide that is done, a note such as no_tissue."""
    message: str = ""
    tiles_20x: int | None = None
    """Of the fine scale."""
    tiles_5x: int | None = None
    """Of the coarse scale."""
    masked_20x: int = 0
    masked_5x: int = 0
    """Tiles whose pixels are damaged: `valid` 0."""
    damaged_blocks: int = 0
    """Blocks of the file that could not be decoded, in this run."""
    tissue_share: float | None = None
    mpp_x: float | None = None
    mpp_y: float | None = None
    mpp_source: str | None = None
    reader: str | None = None
    seconds: float = 0.0
    """From its plan to its bag; slides overlap."""


def read_records(folder: Path) -> dict[str, SlideRecord]:
    """Return the records of earlier runs by path of the slide. Raises CanvasError if the report is damaged."""
    path = folder / REPORT
    if not path.exists():
        return {}
    known = {f.name for f in fields(SlideRecord)}
    try:
        rows = json.loads(path.read_bytes())["slides"]
        return {row["path"]: SlideRecord(**{k: v for k, v in row.items() if k in known}) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CanvasError(
            f"{path} must list the slides of earlier runs; it is damaged ({error}). Remove it: bags that are there "
            "are not made again."
        ) from error


def write_report(folder: Path, records: Sequence[SlideRecord], facts: Mapping[str, Any]) -> None:
    """Write report.json. Raises CanvasError if the disk refuses; the old one then still stands."""
    content = {**facts, "slides": [asdict(record) for record in records]}
    write_atomically(folder / REPORT, (json.dumps(content, indent=1) + "\n").encode())


def write_page(folder: Path, records: Sequence[SlideRecord], facts: Mapping[str, Any]) -> None:
    """Write report.html: totals, tiles/s per stage, failures, then all slides with their thumbnails."""
    failed = [r for r in records if r.status == FAILED]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Features</title><style>{_STYLE}</style>",
        f"<h1>Features of {len(records)} slides</h1>",
        f"<p>{len(records) - len(failed)} done, {len(failed)} failed.</p>",
        "<h2>This run</h2>",
        _table(("what", "value"), [(key, _shown(value)) for key, value in facts.items() if key != "stages"]),
        "<h2>Stages</h2>",
        _stages(facts.get("stages", {})),
    ]
    if failed:
        rows = [(r.slide, r.code, r.message) for r in failed]
        parts += ["<h2>Failures</h2>", _table(("slide", "reason", "what to do"), rows)]
    if noted := [(r.slide, r.code, r.message) for r in records if r.status == DONE and r.code]:
        parts += ["<h2>Notes</h2>", _table(("slide", "note", "what to know"), noted)]
    parts += ["<h2>Slides</h2>", _slides(folder, records), "</html>\n"]
    write_atomically(folder / PAGE, "\n".join(parts).encode())


def _stages(stages: Mapping[str, Mapping[str, float]]) -> str:
    header = ("stage", "seconds of work", "tiles/s per worker")
    return _table(header, [(n, _shown(s["seconds"]), _shown(s["tiles_per_s"])) for n, s in stages.items()])


def _slides(folder: Path, records: Sequence[SlideRecord]) -> str:
    header = ("slide", "", "status", "20x", "5x", "masked", "tissue", "µm/px", "from", "reader", "s")
    lines = ["<table><tr>" + "".join(f"<th>{h}</th>" for h in header) + "</tr>"]
    for r in records:
        mpp = "" if r.mpp_x is None else f"{r.mpp_x:.4g} × {r.mpp_y:.4g}"
        share = "" if r.tissue_share is None else f"{r.tissue_share:.1%}"
        cells = [f"<td>{html.escape(r.slide)}</td>", f"<td>{_preview(folder / 'thumbnails' / f'{r.slide}.jpg')}</td>"]
        status = f"{r.status}: {r.code}" if r.code else r.status
        values = (status, r.tiles_20x, r.tiles_5x, f"{r.masked_20x} + {r.masked_5x}", share, mpp, r.mpp_source)
        cells += [f"<td>{html.escape(_shown(v))}</td>" for v in (*values, r.reader, r.seconds)]
        lines.append(f"<tr class={r.status}>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])


def _preview(path: Path) -> str:
    """Return the thumbnail inside the page, small, with a link to the large one; nothing if there is none."""
    if not path.is_file():
        return ""
    small = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.thumbnail((PREVIEW_PX, PREVIEW_PX))
            picture.save(small, "JPEG", quality=75)
    except UNREADABLE:
        return "damaged"
    data, link = base64.b64encode(small.getvalue()).decode(), f"thumbnails/{quote(path.name)}"
    return f'<a href="{link}"><img src="data:image/jpeg;base64,{data}" alt=""></a>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
