"""The order of a cohort: rows looked up, settings held, what is missing made, records and pages written.

Invariant: a row that cannot be made stops no other; it is recorded with its reason. What the disk, the cluster or the
weights refuse stops the job and loses nothing: the same command goes on. Who makes rows is the caller's choice
(`StartMakers`), so this imports no Ray.
"""

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from engine import __version__
from engine.cohort.bags import BagMaker, bag_file
from engine.cohort.config import CohortConfig
from engine.cohort.output import DONE, FAILED, Record, read_records, write_labels, write_report
from engine.cohort.page import write_page
from engine.cohort.picture import CONDITIONS, PICTURES, RUNS, THUMBNAILS, Made, PictureMaker
from engine.cohort.recipe import rows_of_recipe
from engine.cohort.sources import looked_up
from engine.cohort.table import Asked, BadRow, Row, read_table
from engine.core.errors import (
    BagError,
    CanvasError,
    CanvasMismatchError,
    CheckpointError,
    ClusterError,
    DeviceMemoryError,
    EngineError,
    ReplicaLostError,
)
from engine.core.files import RunLock, disk_error
from engine.core.progress import Progress, ProgressCallback
from engine.core.runtime import Ask, this_process, torch_dtype
from engine.generation.run import Loaded, describe
from engine.generation.session import local_backend
from engine.model.config import ModelConfig
from engine.model.weights import folder as model_folder
from engine.model.weights import hub, ldm_import
from engine.pipeline.run import hold_settings, settle_config, stop_if_nothing_can_be_written

REPORT_EVERY_S = 10.0


@dataclass(frozen=True)
class Failure:
    """Why a row cannot be made."""

    name: str
    code: str
    message: str


Outcome = Made | Failure
MakeRows = Callable[[Sequence[Row]], Iterator[Outcome]]
"""Makes rows, in any order; each gives one outcome."""
StartMakers = Callable[[CohortConfig, ModelConfig, ProgressCallback], AbstractContextManager[MakeRows]]
"""Puts networks to work for a config whose dtype is settled; the callback hears of tiles."""


def rows_of(config: CohortConfig, model: ModelConfig) -> list[Asked]:
    """Return the rows that are asked for, looked up: each a Row with sizes, or why it cannot be made.

    Raises: EngineError where there is no table, no folder, or nothing in them.
    """
    asked = read_table(config) if config.table is not None else rows_of_recipe(config, model.base_mpp)
    return list(looked_up(asked, config, model.base_mpp))


def make_cohort(
    config: CohortConfig,
    start: StartMakers,
    progress: Progress,
    only_failed: bool = False,
    ask: Ask | None = None,
) -> list[Record]:
    """Make what is missing; return the records of all rows.

    `only_failed` tries those rows alone that the last report lists as failed. `ask` tells what networks compute on;
    None: this process does. Raises: EngineError with what the user can do; what is made survives any error and Ctrl-C.
    """
    folder = Path(config.out)
    with RunLock(folder, "out"):
        records = read_records(folder)
        config = settle_config(config, ask or this_process(config.model.device))
        model = describe(config.model)
        asked = rows_of(config, model)
        hold_settings(config, {**config.settings(), "model.weights": weights_digest(config)})
        _make_folders(folder, config)
        job = CohortRun(config, asked, records, progress, only_failed)
        return job.go(lambda: start(config, model, progress))


def weights_digest(config: CohortConfig) -> str:
    """Return the digest of the model as it would be loaded. Raises: CheckpointError."""
    section = config.model
    return model_folder.digest(ldm_import.read(hub.locate(section.source, section.variant)), torch_dtype(section.dtype))


def _make_folders(folder: Path, config: CohortConfig) -> None:
    try:
        for name in (THUMBNAILS, *(() if config.bags_only else (PICTURES, RUNS, CONDITIONS))):
            (folder / name).mkdir(exist_ok=True)
        if config.bags_only:
            for encoder in config.bags.encoders:
                bag_file(config, "x", encoder).parent.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(error, f"{folder} cannot be written", folder) from error


class CohortRun:
    """One invocation."""

    def __init__(
        self,
        config: CohortConfig,
        asked: Sequence[Asked],
        records: Mapping[str, Record],
        progress: Progress,
        only_failed: bool,
    ) -> None:
        """`records` are those of earlier runs by name."""
        self.config, self.folder, self.progress = config, Path(config.out), progress
        self.rows = {row.name: row for row in asked if isinstance(row, Row)}
        self._order = [row.name for row in asked]
        self._bad = [Record.of(row) for row in asked if isinstance(row, BadRow)]
        self.records = {name: self._known(row, records.get(name)) for name, row in self.rows.items()}
        failed = {name for name, record in records.items() if record.status == FAILED}
        self._todo = [
            row
            for name, row in self.rows.items()
            if self.records[name].status != DONE
            and (not only_failed or name in failed)
            # A row that another run made from other values is not made over it.
            and self.records[name].reason != "row_changed"
        ]
        self._begun_s = self._reported_s = time.perf_counter()

    def go(self, start: Callable[[], AbstractContextManager[MakeRows]]) -> list[Record]:
        """Make what is to do; return the records of all rows, in the table's order. Raises EngineError."""
        for record in self._bad:
            self.progress.say(f"{record.reason}: {record.message}")
        total = len(self._todo)
        what = "bags" if self.config.bags_only else "pictures"
        try:
            if total:
                self.progress.say(f"{total} of {len(self._order)} {what} have something to do.")
                with start() as make:
                    self.progress.step(what, 0, total)
                    for done, outcome in enumerate(make(self._todo), 1):
                        self._take(outcome)
                        self.progress.step(what, done, total)
        finally:
            self.progress.close()
            self._write(page=True)
        return self._ordered()

    def _known(self, row: Row, record: Record | None) -> Record:
        """Return what is known of a row: done if its file is there and was made from these values."""
        fresh = Record.of(row)
        if record is None or record.status != DONE or not (self.folder / record.file).exists():
            return fresh
        if record.digest == row.digest:
            return record.labelled_as(row)
        text = (
            f"{row.name}: its file was made from another row (region, seed, size or source differ). Give the row "
            "another name, or remove its file and its run folder."
        )
        return replace(fresh, status=FAILED, reason="row_changed", message=text, file=record.file)

    def _take(self, outcome: Outcome) -> None:
        known = self.records[outcome.name]
        if isinstance(outcome, Failure):
            self.progress.say(f"{outcome.code}: {outcome.message}")
            known = replace(known, status=FAILED, reason=outcome.code, message=outcome.message)
        else:
            known = replace(
                known,
                status=DONE,
                reason=outcome.note,
                message=outcome.message,
                file=outcome.file,
                patches=outcome.patches if self.config.bags_only else None,
                seconds=round(outcome.seconds, 2),
            )
        self.records[outcome.name] = known
        if time.perf_counter() - self._reported_s >= REPORT_EVERY_S:
            self._write(page=False)

    def _ordered(self) -> list[Record]:
        bad = {record.name: record for record in self._bad}
        return [bad[name] if name in bad else self.records[name] for name in self._order]

    def _write(self, page: bool) -> None:
        self._reported_s = time.perf_counter()
        seconds = self._reported_s - self._begun_s
        facts: dict[str, object] = {"version": __version__, "seconds": round(seconds, 2),
                                    "tiles": self.progress.tile_count,
                                    "dtype": self.config.model.dtype}  # fmt: skip
        records = self._ordered()
        write_report(self.folder, records, facts)
        write_labels(self.folder, self.config, records, self.rows)
        if page:
            write_page(self.folder, records, facts, self.config.bags_only)


def outcome_of(row: Row, make: Callable[[], Made], folder: Path) -> Outcome:
    """Return what `make` does for a row; what is wrong with the row alone is a Failure.

    Raises: EngineError for what would end the next row as well: disk, cluster, memory, weights.
    """
    begun = time.perf_counter()
    try:
        return replace(make(), seconds=time.perf_counter() - begun)
    except (ClusterError, ReplicaLostError, DeviceMemoryError):
        raise
    except CheckpointError as error:
        if row.drawn_by is not None:  # the model is there, this network is not
            return Failure(row.name, f"no_{row.drawn_by}", f"{row.name}: {error}")
        raise
    except CanvasMismatchError as error:
        return Failure(row.name, "row_changed", f"{row.name}: {error}")
    except EngineError as error:
        if not isinstance(error, CanvasError) or isinstance(error.__cause__, OSError):
            stop_if_nothing_can_be_written(error, folder)
        return Failure(row.name, code_of(error), f"{row.name}: {error}" if row.name not in str(error) else str(error))


def code_of(error: EngineError) -> str:
    """Return the reason of a failure in one word."""
    known = getattr(error, "code", None)
    if known is not None:
        return str(known)
    if isinstance(error, BagError):
        return "bad_bag"
    return "damaged_run" if isinstance(error, CanvasError) else "bad_conditions"


class TilesOnly:
    """Hears of a picture's run and passes on how many tiles came in, nothing else."""

    def __init__(self, to: ProgressCallback) -> None:
        self._to = to

    def step(self, name: str, done: int, total: int) -> None:
        del name, done, total

    def tiles(self, count: int) -> None:
        self._to.tiles(count)

    def judged(self, scores: Mapping[str, object]) -> None:
        del scores


class Silence(io.StringIO):
    """A stream that takes everything and keeps nothing."""

    def write(self, s: str, /) -> int:
        return len(s)


@contextmanager
def make_alone(config: CohortConfig, model: ModelConfig, watch: ProgressCallback) -> Iterator[MakeRows]:
    """Make rows in this process, one after another, with the networks loaded once; the specification of every other."""
    folder = Path(config.out)
    if config.bags_only:
        bags = BagMaker(config)
        yield lambda rows: (outcome_of(row, lambda row=row: bags.make(row), folder) for row in rows)
        return
    maker = PictureMaker(config, model, Loaded.of(config))

    def make(row: Row) -> Made:
        return maker.make(row, local_backend, Progress(Silence(), TilesOnly(watch)))

    yield lambda rows: (outcome_of(row, lambda row=row: make(row), folder) for row in rows)
