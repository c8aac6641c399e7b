"""What an extraction tells people of each slide. It does not know how features are made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.slide_report import Record, slide_table, write_page_of


@dataclass(frozen=True)
class SlideRecord(Record):
    """What became of one slide."""

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


def write_page(folder: Path, records: Sequence[SlideRecord], facts: Mapping[str, Any]) -> None:
    """Write report.html."""
    header = ("20x", "5x", "masked", "tissue", "µm/px", "from", "reader", "s")
    values = {r.path: _values(r) for r in records}
    parts = ["<h2>Slides</h2>", slide_table(folder, header, records, values)]
    write_page_of(folder, "Features", records, facts, parts)


def _values(r: SlideRecord) -> tuple[object, ...]:
    mpp = "" if r.mpp_x is None else f"{r.mpp_x:.4g} × {r.mpp_y:.4g}"
    share = "" if r.tissue_share is None else f"{r.tissue_share:.1%}"
    masked = f"{r.masked_20x} + {r.masked_5x}"
    return (r.tiles_20x, r.tiles_5x, masked, share, mpp, r.mpp_source, r.reader, r.seconds)
