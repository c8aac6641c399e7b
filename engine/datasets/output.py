"""What a preparation leaves per slide: its part of the set, thumbnail, sample patches, and its line in the report.

Invariant: the only writer of the folder; a block that was taken survives a kill. It does not know how latents and
vectors come about.
"""

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.core.errors import PreparedError, SlideError
from engine.core.files import write_atomically
from engine.datasets.blocks import BlockLatents, PreparedPlan, PrepareTask
from engine.datasets.plan import source_digest
from engine.datasets.schema import SLIDE, SetFacts, SlideFacts, read_slide_facts
from engine.datasets.writer import PreparedWriter, journal_of, slide_folder
from engine.pipeline.report import (
    SLIDE_DONE,
    Facts,
    OpenedRecord,
    Record,
    preview,
    shown,
    slide_table,
    table,
    write_page_of,
)
from engine.pipeline.stages import BlockResult, SlidePlan
from engine.slides.inspect import note_on

SAMPLES = "samples"
_SHOWN = 6
"""Sample patches per magnification on the page."""


@dataclass(frozen=True)
class PreparedRecord(OpenedRecord):
    """What became of one slide."""

    counts: dict[str, int] = field(default_factory=dict)
    """Patches by magnification."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Patches that were left out because pixels under them are damaged."""
    too_small: list[str] = field(default_factory=list)
    """Magnifications of which one patch is larger than the slide."""
    cells: list[int] | None = None
    """Whole base cells (h, w)."""


def as_prepared(records: Sequence[Record]) -> list[PreparedRecord]:
    """Return the records of a preparation as what they are."""
    return [record for record in records if isinstance(record, PreparedRecord)]


def totals(records: Sequence[PreparedRecord], names: Sequence[str]) -> dict[str, int]:
    """Return how many patches there are by magnification."""
    return {name: sum(r.counts.get(name, 0) for r in records if r.status == SLIDE_DONE) for name in names}


def write_page(folder: Path, names: Sequence[str], records: Sequence[Record], facts: Facts) -> None:
    """Write report.html: counts per magnification, sample patches, then all slides with their thumbnails."""
    known = as_prepared(records)
    done = [r for r in known if r.status == SLIDE_DONE]
    counts = totals(known, names)
    rows = []
    for name in names:
        small = sum(name in r.too_small for r in done)
        dropped = sum(r.dropped.get(name, 0) for r in done)
        rows.append((name, shown(counts[name]), shown(len(done) - small), shown(small), shown(dropped)))
    header = ("magnification", "patches", "slides large enough", "slides too small", "left out as damaged")
    values = {r.path: _values(r, names) for r in known}
    parts = ["<h2>Magnifications</h2>", table(header, rows), "<h2>Sample patches</h2>", _samples(folder, names, done)]
    parts += [
        "<h2>Slides</h2>",
        slide_table(folder, (*names, "tissue", "µm/px", "from", "reader", "s"), known, values),
    ]
    write_page_of(folder, "Training set", known, facts, parts)


def _samples(folder: Path, names: Sequence[str], records: Sequence[PreparedRecord]) -> str:
    lines = ["<table>"]
    for name in names:
        there = [f"{SAMPLES}/{name}/{r.slide}.jpg" for r in records]
        pictures = [picture for path in there if (picture := preview(folder, path))][:_SHOWN]
        lines.append(f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{p}</td>" for p in pictures) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _values(r: PreparedRecord, names: Sequence[str]) -> tuple[object, ...]:
    counts = ["too small" if name in r.too_small else r.counts.get(name) for name in names]
    return (*counts, *r.shown())


class PreparedFolder:
    """The folder of a training set: a part per slide, its thumbnail and sample patches."""

    def __init__(self, folder: Path, shared: SetFacts) -> None:
        self.folder, self.shared = folder, shared

    def task(self, slide: str, path: Path) -> PrepareTask | None:
        """Return what of a slide is to do, or None if it is whole.

        Raises: PreparedError for a name that cannot be used; SlideError `changed` if it was made of another file.
        """
        if (slide_folder(self.folder, slide) / SLIDE).is_file():
            facts = read_slide_facts(self.folder, slide)
            if facts.source_digest != source_digest(path):
                raise SlideError(
                    "changed",
                    f"{slide}: {path} must be the file that the slide was prepared of; it is another one now. Remove "
                    f"{slide_folder(self.folder, slide)} to prepare it again, or give the file another name.",
                )
            return None
        return PrepareTask(slide, path, *journal_of(self.folder, slide))

    def record(self, slide: str, path: Path, status: str) -> PreparedRecord:
        """Return the record of a slide of which this run knows no more."""
        if status == SLIDE_DONE:
            return _record(read_slide_facts(self.folder, slide), path)
        return PreparedRecord(slide, str(path), status)

    def writer(self, plan: SlidePlan) -> "PartOfSet":
        """Write the thumbnail; return the writer of the slide's part."""
        assert isinstance(plan, PreparedPlan)  # our own workers made it
        writer = PreparedWriter(self.folder, self.shared, plan.facts, plan.patches)
        _write_picture(self.folder / f"thumbnails/{plan.slide}.jpg", plan.thumbnail)
        return PartOfSet(self.folder, plan, writer, self.shared.magnifications[0])


class PartOfSet:
    """Writes the part of one slide."""

    def __init__(self, folder: Path, plan: PreparedPlan, writer: PreparedWriter, base: str) -> None:
        self.folder, self.plan, self.files, self.base = folder, plan, writer, base

    def store(self, block: BlockResult) -> None:
        assert isinstance(block, BlockLatents)
        arrays = {"latents": block.latents} | ({} if block.images is None else {"images": block.images})
        picture = self.folder / f"{SAMPLES}/{block.magnification}/{block.slide}.jpg"
        # Of the first block, in whatever order they come; before it counts as done, so that a resume need not draw it.
        if block.sample is not None and (block.first == 0 or not picture.exists()):
            _write_picture(picture, _jpeg(block.sample))
        self.files.write(block.index, block.cells, (block.magnification, block.first, arrays))

    def damage(self) -> tuple[int, int]:
        """Return how many patches of the base are damaged, and of how many."""
        bad = self.files.damaged().get(self.base, np.zeros(0, np.bool_))
        return int(bad.sum()), len(bad)

    def finish(self, seconds: float) -> PreparedRecord:
        (masked, total), plan = self.damage(), self.plan
        record = _record(self.files.finish(), plan.path, plan.tissue_share, seconds)
        code, message = note_on(plan.slide, max(1, total), plan.resolution, plan.choice, plan.unseen, masked)
        return replace(record, code=code, message=message, picture=plan.choice.told, unseen_share=plan.unseen)


def _write_picture(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def _record(
    facts: SlideFacts, path: Path, tissue_share: float | None = None, seconds: float = 0.0
) -> PreparedRecord:  # fmt: skip
    if facts.cells is None:
        raise PreparedError(f"{facts.slide} was imported and has no slide of its own; use another --out for {path}.")
    return PreparedRecord(
        facts.slide, str(path), SLIDE_DONE, counts=dict(facts.counts), dropped=dict(facts.dropped),
        too_small=list(facts.too_small), cells=list(facts.cells), tissue_share=tissue_share, mpp_x=facts.mpp[0],
        mpp_y=facts.mpp[1], mpp_source=facts.mpp_source, reader=facts.reader, seconds=seconds,
    )  # fmt: skip


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()
