"""What a cohort leaves beside its pictures or bags: records, cohort.csv, labels.csv. The only writer of the three.

Invariant: labels.csv names what is there, and nothing else; a row that failed is in cohort.csv with its reason.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from engine.cohort.config import CohortConfig
from engine.cohort.table import BadRow, Row
from engine.core.errors import CanvasError
from engine.core.files import write_atomically, write_json
from engine.pipeline.report import REPORT

DONE, FAILED, PENDING = "done", "failed", "pending"
COHORT, LABELS = "cohort.csv", "labels.csv"
COLUMNS = ("name", "file", "label", "patient", "source_patient", "source_slide", "seed", "status", "reason")


@dataclass(frozen=True)
class Record:
    """What became of one row."""

    name: str
    status: str = PENDING
    """done, failed or pending."""
    reason: str = ""
    """Of a failure, in one word; of a row that is done, a note such as fewer_tiles."""
    message: str = ""
    file: str = ""
    label: str = ""
    patient: str = ""
    source_patient: str = ""
    source_slide: str = ""
    seed: int | None = None
    digest: str = ""
    """Of what decided its files."""
    patches: int | None = None
    """Of a bag: patches that were drawn."""
    seconds: float | None = None

    @classmethod
    def of(cls, row: Row | BadRow) -> "Record":
        """Return the record of a row of which nothing is known yet, or that cannot be made."""
        if isinstance(row, BadRow):
            known = cls(row.name) if row.row is None else replace(cls.of(row.row), name=row.name, digest="")
            return replace(known, status=FAILED, reason=row.code, message=row.message)
        return cls(row.name, label=row.label, patient=row.owner, source_patient=row.source_patient,
                   source_slide=row.source_slide, seed=row.seed, digest=row.digest)  # fmt: skip

    def labelled_as(self, row: Row) -> "Record":
        """Return the record with what the table says now of label and patient, which may change."""
        return replace(self, label=row.label, patient=row.owner)


def read_records(folder: Path) -> dict[str, Record]:
    """Return the records of earlier runs by name. Raises CanvasError if the report is damaged."""
    path = folder / REPORT
    if not path.exists():
        return {}
    known = {f.name for f in fields(Record)}
    try:
        rows = json.loads(path.read_bytes())["rows"]
        return {row["name"]: Record(**{k: v for k, v in row.items() if k in known}) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CanvasError(
            f"{path} must list the rows of earlier runs; it is damaged ({error}). Remove it: pictures that are there "
            "are looked through and kept."
        ) from error


def write_report(folder: Path, records: Sequence[Record], facts: Mapping[str, object]) -> None:
    """Write report.json and cohort.csv. Raises CanvasError if the disk refuses; the old ones then still stand."""
    content = {**facts, "rows": [asdict(record) for record in records]}
    write_json(folder / REPORT, content)
    rows = [{name: getattr(record, name) for name in COLUMNS} for record in records]
    write_csv(folder / COHORT, COLUMNS, rows)


def write_labels(folder: Path, config: CohortConfig, records: Sequence[Record], rows: Mapping[str, Row]) -> bool:
    """Write labels.csv, as mil.train takes it, of the rows that are done and of somebody; say whether there are any.

    `slide` is the name of the picture or bag; `patient` the source patient where none of its own is named. A slide
    with a source patient is synthetic to mil: never validated or tested on.
    """
    done = [record for record in records if record.status == DONE and record.patient and record.name in rows]
    if not done:
        return False
    more = list(dict.fromkeys(key for record in done for key, _ in rows[record.name].more))
    own = [config.label] if any(record.label for record in done) and config.label not in more else []
    columns = ["slide", "patient", "source_patient", *own, *more]
    table = []
    for record in done:
        said = {
            "slide": record.name,
            "patient": record.patient,
            "source_patient": record.source_patient or record.patient,
        }
        label = {config.label: record.label} if own else {}
        table.append({**dict.fromkeys(columns, ""), **dict(rows[record.name].more), **label, **said})
    write_csv(folder / LABELS, columns, table)
    return True


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a table. Raises CanvasError if the disk refuses; the old one then still stands."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
