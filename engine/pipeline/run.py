"""The order of a run over a folder of slides: what is missing, who fails, what is written, the report.

Invariant: one bad slide never stops the others; it is recorded with its reason. What the disk or the settings refuse
stops the run and loses nothing. Who reads and encodes is the caller's choice, and what is written per slide is that of
its `OutputFolder`, so this imports no Ray and knows neither features nor training sets.
"""

import errno
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import Field, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import yaml

from engine import __version__
from engine.core.config import ModelConfigSection
from engine.core.errors import CanvasError, CanvasMismatchError, EngineError
from engine.core.files import check_keys, disk_error, plain, write_atomically, write_json
from engine.core.progress import Progress
from engine.core.runtime import Ask, facts_of, remark_on_dtype, settle_dtype
from engine.pipeline.report import SLIDE_DONE, SLIDE_FAILED, Facts, Record, StageFacts, write_report
from engine.pipeline.stages import Backend, BlockResult, Message, SlideFailure, SlidePlan, SlidesConfig, Task
from engine.pipeline.writer import OutputFolder, SlidesUnderWay
from engine.slides.boundary import DISK_ERROR, one_slide
from engine.slides.slide import find_slides, slide_name

SETTINGS = "settings.json"
REPORT_EVERY_S = 10.0
_NO_SLIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a disk says that would refuse the next slide as well."""


@dataclass
class _Stages:
    """Seconds of work and tiles of each stage."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tiles: int = 0
    waited_s: float = 0.0

    def take(self, block: BlockResult) -> None:
        self.tiles += block.tiles
        self.seconds["read"] += block.read_s
        self.seconds["encode"] += block.encode_s
        self.waited_s += block.waited_s

    def facts(self) -> Facts:
        stages: dict[str, StageFacts] = {
            name: {"seconds": round(s, 3), "tiles_per_s": round(self.tiles / s, 2) if s else 0.0}
            for name, s in self.seconds.items()
        }
        busy = self.seconds.get("encode", 0.0) + self.waited_s
        return {"stages": stages, "model_waited_share": round(self.waited_s / busy, 4) if busy else 0.0}


def slides_of(config: SlidesConfig) -> list[Path]:
    """Return the slides of the folder, but for the pictures of the run itself. Raises EngineError if there are none."""
    out = Path(config.out).resolve()
    paths = find_slides(Path(config.slides).absolute())  # not resolved: a link is named by its own name
    inside = {folder: folder.resolve().is_relative_to(out) for folder in {path.parent for path in paths}}
    found = [path for path in paths if not inside[path.parent]]
    if not found:
        raise EngineError(f"{config.slides} must hold slides; it holds those of {out} alone. Choose another --out.")
    return found


class FolderConfig(Protocol):
    """The keys of a command whose output folder is held to the settings it began with; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def out(self) -> str: ...
    @property
    def model(self) -> ModelConfigSection: ...


C = TypeVar("C", bound=FolderConfig)


def settle_config(config: C, ask: Ask) -> C:
    """Settle model.dtype=auto: it decides results, so settings and config.yaml hold what it came to.

    Raises: CanvasError if the settings are damaged; EngineError when nobody can be asked.
    """
    path = Path(config.out) / SETTINGS

    def begun() -> str | None:
        return str(_read_settings(path)["model.dtype"]) if path.exists() else None

    model = replace(config.model, dtype=settle_dtype(config.model.dtype, begun, ask))
    return replace(config, model=model)


def _read_settings(path: Path) -> dict[str, object]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CanvasError(f"{path} must say how the files here are made; {error}. Restore it.") from error


def hold_settings(config: FolderConfig, settings: Mapping[str, object]) -> None:
    """Hold the folder to the settings it began with; write the whole config beside them.

    Raises: CanvasMismatchError naming what differs; CanvasError if the file is damaged or the disk refuses.
    """
    folder, now = Path(config.out), plain(dict(settings))
    path = folder / SETTINGS
    if path.exists():
        check_keys(folder, _read_settings(path), now)
    else:
        write_json(path, now)
    content = yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
    write_atomically(folder / "config.yaml", content.encode())


def stop_if_nothing_can_be_written(error: EngineError, folder: Path) -> None:
    """Raise CanvasError for a disk that is full or closed to us; others, such as a name too long, are of one slide."""
    cause = error.__cause__
    if isinstance(error, CanvasMismatchError) or (isinstance(error, CanvasError) and not isinstance(cause, OSError)):
        raise error
    if isinstance(cause, OSError) and cause.errno in _NO_SLIDE:
        raise error if isinstance(error, CanvasError) else disk_error(cause, f"{folder} cannot be written", folder)


def _code_of(error: EngineError) -> str:
    return DISK_ERROR if isinstance(error, CanvasError) else getattr(error, "code", "bad_output")


class SlideRun(Generic[Task]):
    """One invocation."""

    def __init__(
        self, config: SlidesConfig, paths: Sequence[Path], records: Mapping[str, Record], outputs: OutputFolder[Task],
        most_damage: float, progress: Progress, only_failed: bool = False, asked_dtype: str = "",
    ) -> None:  # fmt: skip
        """`records` are those of earlier runs by path. `only_failed` tries those alone that they list as failed.
        `asked_dtype` is model.dtype before auto was settled; empty: as it is.
        """
        self._arithmetic = asked_dtype, config.model.dtype
        self.folder, self.paths, self.progress, self.outputs = Path(config.out), paths, progress, outputs
        self.slides = SlidesUnderWay(outputs, most_damage)
        self.records = {k: r for k, r in records.items() if Path(k) in set(paths)}
        self.wanted = [p for p in paths if not only_failed or self._status(p) == SLIDE_FAILED]
        self.paths_by_name = {slide_name(path): path for path in paths}
        self.started, self._reported = time.perf_counter(), 0.0
        self._said: set[Path] = set()
        self._given_up: set[str] = set()
        self.stages = _Stages()
        self.facts: dict[str, str | float | Mapping[str, StageFacts]] = {
            "version": __version__,
            "slides_folder": config.slides,
        }

    def go(
        self, start_backend: Callable[[], AbstractContextManager[Backend[Task]]],
        write_page: Callable[[Path, Sequence[Record], Facts], None],
    ) -> list[Record]:  # fmt: skip
        """Do what is missing; return the records of all slides of the folder. Raises EngineError."""
        tasks = self._tasks()
        try:
            if tasks:
                self.progress.say(f"{len(tasks)} of {len(self.paths)} slides have something to do.")
                with start_backend() as backend:
                    self.progress.replicas = backend.replicas
                    self.facts |= facts_of(*self._arithmetic, backend.hardware)
                    if line := remark_on_dtype(*self._arithmetic, backend.hardware):
                        self.progress.say(line)
                    working = time.perf_counter()
                    self._consume(backend.work(tasks, self._given_up), len(tasks))
                    self.facts |= {"replicas": backend.replicas(), "working_s": round(time.perf_counter() - working, 3)}
        finally:
            self.progress.close()
            if tasks or not (self.folder / "report.html").exists():
                write_page(self.folder, self._ordered(), self._report())
        return self._ordered()

    def _status(self, path: Path) -> str | None:
        record = self.records.get(str(path))
        return None if record is None else record.status

    def _tasks(self) -> list[Task]:
        """Return what is to do; slides of one name and names that leave the folder are failures at once."""
        count = Counter(slide_name(path) for path in self.paths)
        tasks: list[Task] = []
        for path in self.wanted:
            name = slide_name(path)
            if count[name] > 1:
                others = ", ".join(str(p) for p in self.paths if slide_name(p) == name and p != path)
                text = (
                    f"{name}: slides must have different names, which name their files; {others} has it too. "
                    "Rename one."
                )
                self._failed(name, path, "duplicate_name", text)
                continue
            try:
                with one_slide(name, path, "looked up among what is written"):
                    task = self.outputs.task(name, path)
                    if task is None and self._status(path) != SLIDE_DONE:
                        self.records[str(path)] = self.outputs.record(name, path, SLIDE_DONE)
            except EngineError as error:
                stop_if_nothing_can_be_written(error, self.folder)
                self._failed(name, path, _code_of(error), str(error))
                continue
            if task is not None:
                tasks.append(task)
        return tasks

    def _consume(self, messages: Iterator[Message], total: int) -> None:
        """Write what arrives. A block may come before its slide's plan: it is kept until then."""
        early: dict[str, list[BlockResult]] = defaultdict(list)
        known: set[str] = set()
        finished = 0
        for message in messages:
            if message.slide in self._given_up:
                continue  # a plan that comes after its slide's failure would be waited for in vain
            if isinstance(message, SlideFailure):
                self.slides.drop(message.slide)
                early.pop(message.slide, None)
                known.add(message.slide)
                self._given_up.add(message.slide)
                self._failed(message.slide, message.path, message.code, message.message)
            elif isinstance(message, BlockResult) and message.slide not in known:
                early[message.slide].append(message)
            else:
                known.add(message.slide)
                self._take(message)
                for block in early.pop(message.slide, []):
                    self._take(block)
            finished = len(known) - len(self.slides.unfinished)
            self.progress.step("slides", finished, total)
            self._report_now_and_then()
        if finished < total:
            raise EngineError(
                f"all blocks of all slides must arrive; {', '.join(self.slides.unfinished) or 'some'} did not. Run "
                "the same command again: what arrived is kept."
            )

    def _take(self, message: SlidePlan | BlockResult) -> None:
        path = self.paths_by_name[message.slide]
        try:
            with one_slide(message.slide, path, "written"):
                if isinstance(message, BlockResult):
                    self.progress.tiles(message.tiles)
                    self.stages.take(message)
                    record = self.slides.take(message)
                else:
                    self.stages.seconds["plan"] += message.seconds
                    record = self.slides.begin(message)
        except EngineError as error:
            stop_if_nothing_can_be_written(error, self.folder)
            self.slides.drop(message.slide)
            self._given_up.add(message.slide)
            self._failed(message.slide, path, _code_of(error), str(error))
            return
        if record is not None:
            self.records[str(path)] = record
            if record.code:
                self.progress.say(f"{record.code}: {record.message}")
        self.stages.seconds["write"] = self.slides.write_s

    def _failed(self, name: str, path: Path, code: str, text: str) -> None:
        if path in self._said:
            return  # its other blocks fail too
        self._said.add(path)
        self.progress.say(f"{code}: {text}")
        known = self.records.get(str(path)) or self.outputs.record(name, path, SLIDE_FAILED)
        self.records[str(path)] = replace(known, status=SLIDE_FAILED, code=code, message=text)

    def _ordered(self) -> list[Record]:
        return [self.records[str(p)] for p in self.paths if str(p) in self.records]

    def _report_now_and_then(self) -> None:
        if time.perf_counter() - self._reported >= REPORT_EVERY_S:
            self._report()

    def _report(self) -> Facts:
        """Write report.json; return what it says of the run."""
        self._reported = time.perf_counter()
        wall = self._reported - self.started
        facts = {"seconds": round(wall, 2), "tiles": self.stages.tiles, "tiles_per_s": self.stages.tiles / wall}
        facts = {**self.facts, **facts, **self.stages.facts()}
        write_report(self.folder, self._ordered(), facts)
        return facts
