"""What a preparation leaves per slide: its part of the set, a thumbnail, sample patches. The only writer of the folder.

Invariant: a block that was taken survives a kill. It does not know how latents and vectors come about.
"""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import PreparedError, SlideError
from engine.preparation_blocks import BlockLatents, PreparedPlan, PrepareTask
from engine.preparation_config import PrepareConfig
from engine.preparation_plan import source_digest
from engine.preparation_report import SAMPLES, PreparedRecord
from engine.prepared_facts import SLIDE, SetFacts, SlideFacts, read_slide_facts
from engine.prepared_writer import PreparedWriter, journal_of, slide_folder
from engine.slide_outputs import OpenSlide, Outputs
from engine.slide_report import DONE
from engine.state import write_atomically


@dataclass
class _OpenSlide(OpenSlide):
    plan: PreparedPlan
    writer: PreparedWriter
    sampled: set[str] = field(default_factory=set)


class PreparedOutputs(Outputs[PreparedPlan, BlockLatents, _OpenSlide, PreparedRecord]):
    """Writes what arrives; knows which slides are under way."""

    def __init__(self, folder: Path, config: PrepareConfig, shared: SetFacts) -> None:
        super().__init__(folder, config.blocks.slide_damage)
        self.config, self.shared = config, shared

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
        if status == DONE:
            return _record(read_slide_facts(self.folder, slide), path)
        return PreparedRecord(slide, str(path), status)

    def _opened(self, plan: PreparedPlan, waiting: int, started: float) -> _OpenSlide:
        writer = PreparedWriter(self.folder, self.shared, plan.facts, plan.patches)
        self._picture(f"thumbnails/{plan.slide}.jpg", plan.thumbnail)
        return _OpenSlide(plan, waiting, started, writer)

    def _store(self, slide: _OpenSlide, block: BlockLatents) -> None:
        arrays = {"latents": block.latents} | ({} if block.images is None else {"images": block.images})
        slide.writer.write(block.index, block.cells, (block.magnification, block.first, arrays))
        if block.sample is not None and block.magnification not in slide.sampled:
            slide.sampled.add(block.magnification)
            self._picture(f"{SAMPLES}/{block.magnification}/{block.slide}.jpg", _jpeg(block.sample))

    def _damage(self, slide: _OpenSlide) -> tuple[int, int]:
        """Return how many patches of the base are damaged, and of how many."""
        bad = slide.writer.damaged().get(self.shared.magnifications[0], np.zeros(0, np.bool_))
        return int(bad.sum()), len(bad)

    def _finished(self, slide: _OpenSlide) -> PreparedRecord:
        facts = slide.writer.finish()
        return _record(facts, slide.plan.path, slide.plan.tissue_share, slide.seconds)

    def _picture(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)


def _record(
    facts: SlideFacts, path: Path, tissue_share: float | None = None, seconds: float = 0.0
) -> PreparedRecord:  # fmt: skip
    if facts.cells is None:
        raise PreparedError(f"{facts.slide} was imported and has no slide of its own; use another --out for {path}.")
    return PreparedRecord(
        facts.slide, str(path), DONE, counts=dict(facts.counts), dropped=dict(facts.dropped),
        too_small=list(facts.too_small), cells=list(facts.cells), tissue_share=tissue_share, mpp_x=facts.mpp[0],
        mpp_y=facts.mpp[1], mpp_source=facts.mpp_source, reader=facts.reader, seconds=seconds,
    )  # fmt: skip


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()
