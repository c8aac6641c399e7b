"""Which slides are under way, and when one is whole, damaged or dropped; what is written is its writer's business.

Invariant: a block that was taken survives a kill; a slide is finished once, when its last block is there.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from engine.core.errors import SlideError
from engine.pipeline.report import Record
from engine.pipeline.stages import BlockResult, OfSlide, SlidePlan, Task

TaskOut = TypeVar("TaskOut", bound=OfSlide, covariant=True)


class SlideWriter(Protocol):
    """Writes the files of one slide. Its methods raise EngineError for what cannot be used."""

    def store(self, block: BlockResult) -> None:
        """Write a block."""
        ...

    def damage(self) -> tuple[int, int]:
        """Return how many tiles are damaged, and of how many."""
        ...

    def finish(self, seconds: float) -> Record:
        """Make the slide's files whole; return its record. `seconds` have passed since its planning began."""
        ...


class OutputFolder(Protocol[TaskOut]):
    """The folder that a run over slides writes: what lies there of a slide, and a writer for what is missing."""

    def task(self, slide: str, path: Path) -> TaskOut | None:
        """Return what of a slide is to do, or None if nothing is missing. Raises EngineError."""
        ...

    def record(self, slide: str, path: Path, status: str) -> Record:
        """Return the record of a slide of which this run knows no more."""
        ...

    def writer(self, plan: SlidePlan) -> SlideWriter:
        """Write what is known before any block; return the writer of the rest. Raises EngineError."""
        ...


@dataclass
class _UnderWay:
    plan: SlidePlan
    writer: SlideWriter
    waiting: int
    """Blocks that have not arrived."""
    started: float


class SlidesUnderWay(Generic[Task]):
    """Takes plans and blocks as they arrive, and gives each to its slide's writer."""

    def __init__(self, outputs: OutputFolder[Task], most_damage: float) -> None:
        """A slide of which more than a share `most_damage` of the tiles is damaged fails."""
        self.outputs, self.most_damage = outputs, most_damage
        self.write_s = 0.0
        self._open: dict[str, _UnderWay] = {}

    def begin(self, plan: SlidePlan) -> Record | None:
        """Take up a slide; return its record if no block is missing."""
        start = time.perf_counter()
        writer = self.outputs.writer(plan)
        self._open[plan.slide] = _UnderWay(plan, writer, plan.to_come, start - plan.seconds)
        return self._finish_if_complete(plan.slide, start)

    def take(self, block: BlockResult) -> Record | None:
        """Store a block; return the slide's record when it was the last.

        Blocks of a slide that has failed are dropped.
        """
        start = time.perf_counter()
        slide = self._open.get(block.slide)
        if slide is None:
            return None
        slide.writer.store(block)
        slide.waiting -= 1
        return self._finish_if_complete(block.slide, start)

    def drop(self, slide: str) -> None:
        """Stop waiting for a slide that failed; what is written stays for the next try."""
        self._open.pop(slide, None)

    @property
    def unfinished(self) -> list[str]:
        """Names of the slides whose blocks have not all arrived."""
        return list(self._open)

    def _finish_if_complete(self, name: str, start: float) -> Record | None:
        slide, record = self._open[name], None
        if not slide.waiting:
            self._refuse_damage(slide)
            record = slide.writer.finish(round(time.perf_counter() - slide.started, 2))
            del self._open[name]
        self.write_s += time.perf_counter() - start
        return record

    def _refuse_damage(self, slide: _UnderWay) -> None:
        """Raise SlideError `damaged`."""
        (bad, total), limit = slide.writer.damage(), self.most_damage
        if bad > limit * total:
            raise SlideError(
                "damaged",
                f"{slide.plan.slide}: at most {limit:.0%} of the tiles may be damaged; {bad / total:.0%} are ({bad} of "
                f"{total}). Copy {slide.plan.path} again, or raise --blocks.slide_damage: the tiles are kept.",
            )
