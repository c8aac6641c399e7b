"""What a run over slides tells people: report.json, and the parts of report.html, one page that needs no network.

It does not know what is made of slides. A slide that an earlier run did keeps its record.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar
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
class Record:
    """What became of one slide."""

    slide: str
    path: str
    status: str
    """done or failed."""
    code: str = ""
    """Reason of a failure in one word; of a slide that is done, a note such as no_tissue."""
    message: str = ""


R = TypeVar("R", bound=Record)


def read_records(folder: Path, kind: type[R]) -> dict[str, R]:
    """Return the records of earlier runs by path of the slide. Raises CanvasError if the report is damaged."""
    path = folder / REPORT
    if not path.exists():
        return {}
    known = {f.name for f in fields(kind)}
    try:
        rows = json.loads(path.read_bytes())["slides"]
        return {row["path"]: kind(**{k: v for k, v in row.items() if k in known}) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CanvasError(
            f"{path} must list the slides of earlier runs; it is damaged ({error}). Remove it: what is there of the "
            "slides is not made again."
        ) from error


def write_report(folder: Path, records: Sequence[Record], facts: Mapping[str, Any]) -> None:
    """Write report.json. Raises CanvasError if the disk refuses; the old one then still stands."""
    content = {**facts, "slides": [asdict(record) for record in records]}
    write_atomically(folder / REPORT, (json.dumps(content, indent=1) + "\n").encode())


def write_page_of(
    folder: Path, title: str, records: Sequence[Record], facts: Mapping[str, Any], parts: Sequence[str]
) -> None:
    """Write report.html: totals, tiles/s per stage, failures and notes, then `parts`."""
    failed = [r for r in records if r.status == FAILED]
    lines = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(title)} of {len(records)} slides</h1>",
        f"<p>{len(records) - len(failed)} done, {len(failed)} failed.</p>",
        "<h2>This run</h2>",
        table(("what", "value"), [(key, shown(value)) for key, value in facts.items() if key != "stages"]),
        "<h2>Stages</h2>",
        _stages(facts.get("stages", {})),
    ]
    if failed:
        rows = [(r.slide, r.code, r.message) for r in failed]
        lines += ["<h2>Failures</h2>", table(("slide", "reason", "what to do"), rows)]
    if noted := [(r.slide, r.code, r.message) for r in records if r.status == DONE and r.code]:
        lines += ["<h2>Notes</h2>", table(("slide", "note", "what to know"), noted)]
    write_atomically(folder / PAGE, "\n".join([*lines, *parts, "</html>\n"]).encode())


def _stages(stages: Mapping[str, Mapping[str, float]]) -> str:
    header = ("stage", "seconds of work", "tiles/s per worker")
    return table(header, [(n, shown(s["seconds"]), shown(s["tiles_per_s"])) for n, s in stages.items()])


def slide_table(
    folder: Path, header: Sequence[str], records: Sequence[R], values: Mapping[str, Sequence[object]]
) -> str:
    """Return the table of all slides: thumbnail, status and the `values` of each by path, under `header`."""
    columns = ("slide", "", "status", *header)
    lines = ["<table><tr>" + "".join(f"<th>{h}</th>" for h in columns) + "</tr>"]
    for r in records:
        cells = [f"<td>{html.escape(r.slide)}</td>", f"<td>{preview(folder, f'thumbnails/{r.slide}.jpg')}</td>"]
        status = f"{r.status}: {r.code}" if r.code else r.status
        cells += [f"<td>{html.escape(shown(v))}</td>" for v in (status, *values[r.path])]
        lines.append(f"<tr class={r.status}>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])


def preview(folder: Path, name: str) -> str:
    """Return a picture of the folder inside the page, small, with a link to the large one; nothing if there is none."""
    path = folder / name
    if not path.is_file():
        return ""
    small = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.thumbnail((PREVIEW_PX, PREVIEW_PX))
            picture.save(small, "JPEG", quality=75)
    except UNREADABLE:
        return "damaged"
    data = base64.b64encode(small.getvalue()).decode()
    return f'<a href="{quote(name)}"><img src="data:image/jpeg;base64,{data}" alt=""></a>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts, escaped."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def shown(value: object) -> str:
    """Return a value as people read it; None is nothing."""
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
