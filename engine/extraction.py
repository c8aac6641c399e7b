"""The order of an extraction: slides in, bags and a report out; a second run does only what is missing.

Invariant: one bad slide never stops the others; it is recorded with its reason. What the disk or the settings refuse
stops the run and loses nothing. Who reads and encodes is the caller's choice (`Engage`), so this imports no Ray.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine import __version__
from engine.errors import BagError, CanvasError, EngineError, SlideError
from engine.extraction_blocks import BlockFeatures, Message, SlideFailure, SlidePlan, SlideTask
from engine.extraction_config import ExtractConfig
from engine.extraction_encoders import describe, scale_names
from engine.extraction_outputs import SlideOutputs, failure
from engine.extraction_report import DONE, FAILED, SlideRecord, read_records, write_page, write_report
from engine.lock import RunLock
from engine.progress import Progress
from engine.slides.slide import find_slides, slide_name
from engine.state import check_keys, plain, write_atomically

SETTINGS = "settings.json"
REPORT_EVERY_S = 10.0


@dataclass(frozen=True)
class Crew:
    """Who plans, reads and encodes. `work` yields of each task its plan and all its blocks, or a failure."""

    work: Callable[[Sequence[SlideTask]], Iterator[Message]]
    device: str
    replicas: Callable[[], int]


Engage = Callable[[ExtractConfig, tuple[str, str]], AbstractContextManager[Crew]]
"""Puts the encoders to work on the slides of a config, at two magnifications."""


@dataclass
class _Stages:
    """Seconds of work and tiles of each stage."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tiles: int = 0
    waited_s: float = 0.0

    def take(self, block: BlockFeatures) -> None:
        self.tiles += block.tiles
        self.seconds["read"] += block.read_s
        self.seconds["encode"] += block.encode_s
        self.waited_s += block.waited_s

    def facts(self) -> dict[str, Any]:
        stages = {
            name: {"seconds": round(s, 3), "tiles_per_s": round(self.tiles / s, 2) if s else 0.0}
            for name, s in self.seconds.items()
        }
        busy = self.seconds.get("encode", 0.0) + self.waited_s
        return {"stages": stages, "model_waited_share": round(self.waited_s / busy, 4) if busy else 0.0}


def extract(config: ExtractConfig, engage: Engage, progress: Progress, only_failed: bool = False) -> list[SlideRecord]:
    """Make the features that are missing; return the records of all slides of the folder.

    `only_failed` tries those alone that the last report lists as failed. Raises: EngineError with what the user can
    do; blocks that are written survive any error and Ctrl-C.
    """
    paths = slides_of(config)
    folder = Path(config.out)
    with RunLock(folder, "out"):
        return _Run(config, folder, paths, progress, only_failed).go(engage)


def slides_of(config: ExtractConfig) -> list[Path]:
    """Return the slides of the folder, but for the pictures of the run itself. Raises EngineError if there are none."""
    out = Path(config.out).resolve()
    # Absolute, but not resolved: a link is named by its own name.
    found = [path for path in find_slides(Path(config.slides).absolute()) if not path.is_relative_to(out)]
    if not found:
        raise EngineError(f"{config.slides} must hold slides; it holds those of {out} alone. Choose another --out.")
    return found


class _Run:
    """One invocation."""

    def __init__(
        self, config: ExtractConfig, folder: Path, paths: Sequence[Path], progress: Progress, only_failed: bool
    ) -> None:
        self.config, self.folder, self.paths, self.progress = config, folder, paths, progress
        self.records = {k: r for k, r in read_records(folder).items() if Path(k) in set(paths)}
        self.wanted = [p for p in paths if not only_failed or self._status(p) == FAILED]
        self.paths_by_name = {slide_name(path): path for path in paths}
        self.started, self._reported = time.perf_counter(), 0.0
        self._said: set[Path] = set()
        self.stages = _Stages()
        self.facts: dict[str, Any] = {"version": __version__, "slides_folder": config.slides}

    def go(self, engage: Engage) -> list[SlideRecord]:
        names = scale_names(self.config)
        encoders = describe(self.config)
        self._check_settings({e: f.attributes["weights_sha256"] for e, f in encoders.items()})
        self.outputs = SlideOutputs(self.folder, self.config, names, encoders)
        tasks = self._tasks()
        try:
            if tasks:
                self.progress.say(f"{len(tasks)} of {len(self.paths)} slides have something to do.")
                with engage(self.config, names) as crew:
                    self.progress.replicas = crew.replicas
                    self.facts |= {"device": crew.device}
                    working = time.perf_counter()
                    self._consume(crew.work(tasks), len(tasks))
                    self.facts |= {"replicas": crew.replicas(), "working_s": round(time.perf_counter() - working, 3)}
        finally:
            self.progress.close()
            if tasks or not (self.folder / "report.html").exists():
                self._report(page=True)
        return self._ordered()

    def _status(self, path: Path) -> str | None:
        record = self.records.get(str(path))
        return None if record is None else record.status

    def _check_settings(self, weights: Mapping[str, str]) -> None:
        """Hold the folder to the settings it began with. Raises CanvasMismatchError naming what differs."""
        first = self.config.encoders[0]
        now = plain({**self.config.settings(), "weights": weights[first]})
        path = self.folder / SETTINGS
        if path.exists():
            try:
                then = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise CanvasError(f"{path} must say how the bags here are made; {error}. Restore it.") from error
            check_keys(self.folder, then, now)
        else:
            write_atomically(path, (json.dumps(now, indent=1) + "\n").encode())
        content = yaml.safe_dump(json.loads(json.dumps(asdict(self.config))), sort_keys=False)
        write_atomically(self.folder / "config.yaml", content.encode())

    def _tasks(self) -> list[SlideTask]:
        """Return what is to do; slides of one name and names that leave the folder are failures at once."""
        count = Counter(slide_name(path) for path in self.paths)
        tasks = []
        for path in self.wanted:
            name = slide_name(path)
            if count[name] > 1:
                others = ", ".join(str(p) for p in self.paths if slide_name(p) == name and p != path)
                text = (
                    f"{name}: slides must have different names, which name their bags; {others} has it too. Rename one."
                )
                self._failed(name, path, "duplicate_name", text)
                continue
            try:
                task = self.outputs.task(name, path)
            except BagError as error:
                self._failed(name, path, "bad_output", str(error))
                continue
            if task is not None:
                tasks.append(task)
            elif self._status(path) != DONE:
                self.records[str(path)] = SlideRecord(name, str(path), DONE)
        return tasks

    def _consume(self, messages: Iterator[Message], total: int) -> None:
        """Write what arrives. A block may come before its slide's plan: it is kept until then."""
        early: dict[str, list[BlockFeatures]] = defaultdict(list)
        known: set[str] = set()
        finished = 0
        for message in messages:
            if isinstance(message, SlideFailure):
                self.outputs.drop(message.slide)
                known.add(message.slide)
                self._failed(message.slide, message.path, message.code, message.message)
            elif isinstance(message, BlockFeatures) and message.slide not in known:
                early[message.slide].append(message)
            else:
                known.add(message.slide)
                self._take(message)
                for block in early.pop(message.slide, []):
                    self._take(block)
            finished = len(known) - len(self.outputs.unfinished)
            self.progress.step("slides", finished, total)
            self._report()
        if finished < total:
            raise EngineError(
                f"all blocks of all slides must arrive; {', '.join(self.outputs.unfinished) or 'some'} did not. Run "
                "the same command again: what arrived is kept."
            )

    def _take(self, message: SlidePlan | BlockFeatures) -> None:
        path = self.paths_by_name[message.slide]
        try:
            if isinstance(message, SlidePlan):
                self.stages.seconds["plan"] += message.seconds
                record = self.outputs.begin(message)
            else:
                self.progress.tiles(message.tiles)
                self.stages.take(message)
                record = self.outputs.take(message)
        except (BagError, SlideError) as error:
            self.outputs.drop(message.slide)
            self._failed(message.slide, path, getattr(error, "code", "bad_output"), str(error))
            return
        if record is not None:
            self.records[str(path)] = record
            if record.code:
                self.progress.say(f"{record.code}: {record.message}")
        self.stages.seconds["write"] = self.outputs.write_s

    def _failed(self, name: str, path: Path, code: str, text: str) -> None:
        old = self.records.get(str(path))
        if path in self._said:
            return  # its other blocks fail too
        self._said.add(path)
        self.progress.say(f"{code}: {text}")
        self.records[str(path)] = failure(old, name, path, FAILED, code, text)

    def _ordered(self) -> list[SlideRecord]:
        return [self.records[str(p)] for p in self.paths if str(p) in self.records]

    def _report(self, page: bool = False) -> None:
        """Write the report, not too often while slides go by."""
        now = time.perf_counter()
        if page or now - self._reported >= REPORT_EVERY_S:
            self._reported = now
            wall = now - self.started
            facts = {"seconds": round(wall, 2), "tiles": self.stages.tiles, "tiles_per_s": self.stages.tiles / wall}
            facts = {**self.facts, **facts, **self.stages.facts()}
            write_report(self.folder, self._ordered(), facts)
            if page:
                write_page(self.folder, self._ordered(), facts)
