"""What a run over slides leaves per slide, whatever it is: when a slide is begun, whole, damaged or dropped.

Invariant: a block that was taken survives a kill; a slide is finished once, when its last block is there. What is
written is the subclass's; it is the only writer of its folder.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from engine.errors import SlideError
from engine.slide_crew import BlockResult
from engine.slide_report import Record


class Plan(Protocol):
    """What every plan of a slide says about itself."""

    @property
    def slide(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def blocks(self) -> Sized: ...
    @property
    def seconds(self) -> float: ...


@dataclass
class OpenSlide:
    """A slide whose blocks arrive."""

    plan: Any
    waiting: int
    """Blocks that have not arrived."""
    started: float

    @property
    def seconds(self) -> float:
        """How long ago its planning began."""
        return round(time.perf_counter() - self.started, 2)


P = TypeVar("P", bound=Plan)
B = TypeVar("B", bound=BlockResult)
S = TypeVar("S", bound=OpenSlide)
R = TypeVar("R", bound=Record)


class Outputs(ABC, Generic[P, B, S, R]):
    """Writes what arrives; knows which slides are under way. Its methods raise EngineError for what cannot be used."""

    def __init__(self, folder: Path, most_damage: float) -> None:
        """A slide of which more than a share `most_damage` of the patches is damaged fails."""
        self.folder, self.most_damage = folder, most_damage
        self.write_s = 0.0
        self._open: dict[str, S] = {}

    @abstractmethod
    def task(self, slide: str, path: Path) -> Any | None:
        """Return what of a slide is to do, or None if nothing is missing."""

    @abstractmethod
    def record(self, slide: str, path: Path, status: str) -> R:
        """Return the record of a slide of which this run knows no more."""

    @abstractmethod
    def _opened(self, plan: P, waiting: int, started: float) -> S:
        """Write what is known before any block; return the slide."""

    @abstractmethod
    def _store(self, slide: S, block: B) -> None:
        """Write a block."""

    @abstractmethod
    def _damage(self, slide: S) -> tuple[int, int]:
        """Return how many patches are damaged, and of how many."""

    @abstractmethod
    def _finished(self, slide: S) -> R:
        """Make the slide's files whole; return its record."""

    def begin(self, plan: P) -> R | None:
        """Take up a slide; return its record if no block is missing."""
        start = time.perf_counter()
        self._open[plan.slide] = self._opened(plan, len(plan.blocks), start - plan.seconds)
        return self._finish_if_complete(plan.slide, start)

    def take(self, block: B) -> R | None:
        """Store a block; return the slide's record when it was the last.

        Blocks of a slide that has failed are dropped.
        """
        start = time.perf_counter()
        slide = self._open.get(block.slide)
        if slide is None:
            return None
        self._store(slide, block)
        slide.waiting -= 1
        return self._finish_if_complete(block.slide, start)

    def drop(self, slide: str) -> None:
        """Stop waiting for a slide that failed; what is written stays for the next try."""
        self._open.pop(slide, None)

    @property
    def unfinished(self) -> list[str]:
        """Names of the slides whose blocks have not all arrived."""
        return list(self._open)

    def _finish_if_complete(self, name: str, start: float) -> R | None:
        slide, record = self._open[name], None
        if not slide.waiting:
            self._refuse_damage(slide)
            record = self._finished(slide)
            del self._open[name]
        self.write_s += time.perf_counter() - start
        return record

    def _refuse_damage(self, slide: S) -> None:
        """Raise SlideError `damaged`."""
        (bad, total), limit = self._damage(slide), self.most_damage
        if bad > limit * total:
            raise SlideError(
                "damaged",
                f"{slide.plan.slide}: at most {limit:.0%} of the tiles may be damaged; {bad / total:.0%} are ({bad} of "
                f"{total}). Copy {slide.plan.path} again, or raise --blocks.slide_damage: the tiles are kept.",
            )
