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
from typing import TypedDict, TypeVar
from urllib.parse import quote

from PIL import Image

from engine.core.errors import UNREADABLE, CanvasError
from engine.core.files import write_atomically, write_json

REPORT, PAGE = "report.json", "report.html"
PREVIEW_PX = 160
SLIDE_DONE, SLIDE_FAILED = "done", "failed"
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


@dataclass(frozen=True)
class OpenedRecord(Record):
    """What became of one slide, and what its file says of itself."""

    unseen_share: float | None = None
    """Of the slide: damaged at every level, so that nobody can tell whether there is tissue."""
    picture: str = ""
    """Which of several pictures of the file is read, and what is left out."""
    tissue_share: float | None = None
    mpp_x: float | None = None
    mpp_y: float | None = None
    """µm/px of level 0."""
    mpp_source: str | None = None
    reader: str | None = None
    seconds: float = 0.0
    """From its plan to its last file; slides overlap."""

    def shown(self) -> tuple[object, ...]:
        """Return what the page's table tells of the file: tissue, µm/px and its source, reader, seconds."""
        mpp = "" if self.mpp_x is None else f"{self.mpp_x:.4g} × {self.mpp_y:.4g}"
        share = "" if self.tissue_share is None else f"{self.tissue_share:.1%}"
        return share, mpp, self.mpp_source, self.reader, self.seconds


R = TypeVar("R", bound=Record)


class StageFacts(TypedDict):
    """What report.json says of a stage."""

    seconds: float
    tiles_per_s: float


Facts = Mapping[str, str | float | Mapping[str, StageFacts]]
"""What report.json says of a run; `stages` by name."""


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


def write_report(folder: Path, records: Sequence[Record], facts: Facts) -> None:
    """Write report.json. Raises CanvasError if the disk refuses; the old one then still stands."""
    content = {**facts, "slides": [asdict(record) for record in records]}
    write_json(folder / REPORT, content)


def write_page_of(folder: Path, title: str, records: Sequence[Record], facts: Facts, parts: Sequence[str]) -> None:
    """Write report.html: totals, tiles/s per stage, failures and notes, then `parts`."""
    failed = [r for r in records if r.status == SLIDE_FAILED]
    lines = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(title)} of {len(records)} slides</h1>",
        f"<p>{len(records) - len(failed)} done, {len(failed)} failed.</p>",
        "<h2>This run</h2>",
        table(("what", "value"), [(key, shown(v)) for key, v in facts.items() if not isinstance(v, Mapping)]),
        "<h2>Stages</h2>",
        *(_stages(stages) for stages in facts.values() if isinstance(stages, Mapping)),
    ]
    if failed:
        rows = [(r.slide, r.code, r.message) for r in failed]
        lines += ["<h2>Failures</h2>", table(("slide", "reason", "what to do"), rows)]
    if noted := [(r.slide, r.code, r.message) for r in records if r.status == SLIDE_DONE and r.code]:
        lines += ["<h2>Notes</h2>", table(("slide", "note", "what to know"), noted)]
    write_atomically(folder / PAGE, "\n".join([*lines, *parts, "</html>\n"]).encode())


def _stages(stages: Mapping[str, StageFacts]) -> str:
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
