"""The order of a run over a folder of slides: what is missing, who fails, what is written, the report.

Invariant: one bad slide never stops the others; it is recorded with its reason. What the disk or the settings refuse
stops the run and loses nothing. Who reads and encodes is the caller's choice, and what is written per slide is that of
its `Outputs`, so this imports no Ray and knows neither features nor training sets.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from engine import __version__
from engine.devices import Ask
from engine.environment import facts_of, remark_on_dtype, settle_dtype
from engine.errors import BagError, CanvasError, EngineError, PreparedError, SlideError
from engine.progress import Progress
from engine.slide_crew import BlockResult, Crew, SlideFailure, SlidesConfig
from engine.slide_outputs import Outputs
from engine.slide_report import DONE, FAILED, Record, write_report
from engine.slides.slide import find_slides, slide_name
from engine.state import check_keys, plain, write_atomically

SETTINGS = "settings.json"
REPORT_EVERY_S = 10.0
R = TypeVar("R", bound=Record)


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

    def facts(self) -> dict[str, Any]:
        stages = {
            name: {"seconds": round(s, 3), "tiles_per_s": round(self.tiles / s, 2) if s else 0.0}
            for name, s in self.seconds.items()
        }
        busy = self.seconds.get("encode", 0.0) + self.waited_s
        return {"stages": stages, "model_waited_share": round(self.waited_s / busy, 4) if busy else 0.0}


def slides_of(config: SlidesConfig) -> list[Path]:
    """Return the slides of the folder, but for the pictures of the run itself. Raises EngineError if there are none."""
    out = Path(config.out).resolve()
    # Absolute, but not resolved: a link is named by its own name.
    found = [path for path in find_slides(Path(config.slides).absolute()) if not path.is_relative_to(out)]
    if not found:
        raise EngineError(f"{config.slides} must hold slides; it holds those of {out} alone. Choose another --out.")
    return found


C = TypeVar("C", bound=SlidesConfig)


def settle_config(config: C, ask: Ask) -> C:
    """Settle model.dtype=auto: it decides results, so settings and config.yaml hold what it came to.

    Raises: CanvasError if the settings are damaged; EngineError when nobody can be asked.
    """
    path = Path(config.out) / SETTINGS

    def begun() -> str | None:
        return str(_read_settings(path)["model.dtype"]) if path.exists() else None

    model = replace(config.model, dtype=settle_dtype(config.model.dtype, begun, ask))  # type: ignore[arg-type]
    return replace(config, model=model)  # type: ignore[type-var]  # a frozen dataclass


def _read_settings(path: Path) -> dict[str, object]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CanvasError(f"{path} must say how the files here are made; {error}. Restore it.") from error


def hold_settings(config: Any, settings: Mapping[str, object]) -> None:
    """Hold the folder to the settings it began with; write the whole config beside them.

    Raises: CanvasMismatchError naming what differs; CanvasError if the file is damaged or the disk refuses.
    """
    folder, now = Path(config.out), plain(dict(settings))
    path = folder / SETTINGS
    if path.exists():
        check_keys(folder, _read_settings(path), now)
    else:
        write_atomically(path, (json.dumps(now, indent=1) + "\n").encode())
    content = yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
    write_atomically(folder / "config.yaml", content.encode())


class SlideRun(Generic[R]):
    """One invocation."""

    def __init__(
        self, config: SlidesConfig, paths: Sequence[Path], records: Mapping[str, R], outputs: Outputs[Any, Any, Any, R],
        progress: Progress, only_failed: bool = False, asked_dtype: str = "",
    ) -> None:  # fmt: skip
        """`records` are those of earlier runs by path. `only_failed` tries those alone that they list as failed.
        `asked_dtype` is model.dtype before auto was settled; empty: as it is.
        """
        self._arithmetic = asked_dtype, config.model.dtype
        self.folder, self.paths, self.progress, self.outputs = Path(config.out), paths, progress, outputs
        self.records = {k: r for k, r in records.items() if Path(k) in set(paths)}
        self.wanted = [p for p in paths if not only_failed or self._status(p) == FAILED]
        self.paths_by_name = {slide_name(path): path for path in paths}
        self.started, self._reported = time.perf_counter(), 0.0
        self._said: set[Path] = set()
        self.stages = _Stages()
        self.facts: dict[str, Any] = {"version": __version__, "slides_folder": config.slides}

    def go(
        self, engage: Callable[[], AbstractContextManager[Crew]],
        write_page: Callable[[Path, Sequence[R], Mapping[str, Any]], None],
    ) -> list[R]:  # fmt: skip
        """Do what is missing; return the records of all slides of the folder. Raises EngineError."""
        tasks = self._tasks()
        try:
            if tasks:
                self.progress.say(f"{len(tasks)} of {len(self.paths)} slides have something to do.")
                with engage() as crew:
                    self.progress.replicas = crew.replicas
                    self.facts |= facts_of(*self._arithmetic, crew.hardware)
                    if line := remark_on_dtype(*self._arithmetic, crew.hardware):
                        self.progress.say(line)
                    working = time.perf_counter()
                    self._consume(crew.work(tasks), len(tasks))
                    self.facts |= {"replicas": crew.replicas(), "working_s": round(time.perf_counter() - working, 3)}
        finally:
            self.progress.close()
            if tasks or not (self.folder / "report.html").exists():
                write_page(self.folder, self._ordered(), self._report())
        return self._ordered()

    def _status(self, path: Path) -> str | None:
        record = self.records.get(str(path))
        return None if record is None else record.status

    def _tasks(self) -> list[Any]:
        """Return what is to do; slides of one name and names that leave the folder are failures at once."""
        count = Counter(slide_name(path) for path in self.paths)
        tasks = []
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
                task = self.outputs.task(name, path)
            except (BagError, PreparedError, SlideError) as error:
                self._failed(name, path, getattr(error, "code", "bad_output"), str(error))
                continue
            if task is not None:
                tasks.append(task)
            elif self._status(path) != DONE:
                self.records[str(path)] = self.outputs.record(name, path, DONE)
        return tasks

    def _consume(self, messages: Iterator[Any], total: int) -> None:
        """Write what arrives. A block may come before its slide's plan: it is kept until then."""
        early: dict[str, list[BlockResult]] = defaultdict(list)
        known: set[str] = set()
        finished = 0
        for message in messages:
            if isinstance(message, SlideFailure):
                self.outputs.drop(message.slide)
                known.add(message.slide)
                self._failed(message.slide, message.path, message.code, message.message)
            elif isinstance(message, BlockResult) and message.slide not in known:
                early[message.slide].append(message)
            else:
                known.add(message.slide)
                self._take(message)
                for block in early.pop(message.slide, []):
                    self._take(block)
            finished = len(known) - len(self.outputs.unfinished)
            self.progress.step("slides", finished, total)
            self._report_now_and_then()
        if finished < total:
            raise EngineError(
                f"all blocks of all slides must arrive; {', '.join(self.outputs.unfinished) or 'some'} did not. Run "
                "the same command again: what arrived is kept."
            )

    def _take(self, message: Any) -> None:
        path = self.paths_by_name[message.slide]
        try:
            if isinstance(message, BlockResult):
                self.progress.tiles(message.tiles)
                self.stages.take(message)
                record = self.outputs.take(message)
            else:
                self.stages.seconds["plan"] += message.seconds
                record = self.outputs.begin(message)
        except (BagError, PreparedError, SlideError) as error:
            self.outputs.drop(message.slide)
            self._failed(message.slide, path, getattr(error, "code", "bad_output"), str(error))
            return
        if record is not None:
            self.records[str(path)] = record
            if record.code:
                self.progress.say(f"{record.code}: {record.message}")
        self.stages.seconds["write"] = self.outputs.write_s

    def _failed(self, name: str, path: Path, code: str, text: str) -> None:
        if path in self._said:
            return  # its other blocks fail too
        self._said.add(path)
        self.progress.say(f"{code}: {text}")
        known = self.records.get(str(path)) or self.outputs.record(name, path, FAILED)
        self.records[str(path)] = replace(known, status=FAILED, code=code, message=text)

    def _ordered(self) -> list[R]:
        return [self.records[str(p)] for p in self.paths if str(p) in self.records]

    def _report_now_and_then(self) -> None:
        if time.perf_counter() - self._reported >= REPORT_EVERY_S:
            self._report()

    def _report(self) -> dict[str, Any]:
        """Write report.json; return what it says of the run."""
        self._reported = time.perf_counter()
        wall = self._reported - self.started
        facts = {"seconds": round(wall, 2), "tiles": self.stages.tiles, "tiles_per_s": self.stages.tiles / wall}
        facts = {**self.facts, **facts, **self.stages.facts()}
        write_report(self.folder, self._ordered(), facts)
        return facts
