"""The order of a preparation: slides in, a training set and a report out; a second run does only what is missing.

Who reads and encodes is the caller's choice (`StartBackend`), so this imports no Ray. The order
itself is engine.pipeline.run's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from engine.core.files import RunLock
from engine.core.progress import Progress
from engine.core.runtime import Ask, this_process
from engine.datasets.blocks import PrepareStages, PrepareTask
from engine.datasets.config import PrepareConfig
from engine.datasets.networks import set_facts
from engine.datasets.output import PreparedFolder, PreparedRecord, as_prepared, write_page
from engine.datasets.writer import open_set
from engine.pipeline.report import read_records
from engine.pipeline.run import SlideRun, hold_settings, settle_config, slides_of
from engine.pipeline.stages import Backend

StartBackend = Callable[[PrepareStages], AbstractContextManager[Backend[PrepareTask]]]


def prepare(
    config: PrepareConfig, start: StartBackend, progress: Progress, only_failed: bool = False, ask: Ask | None = None
) -> list[PreparedRecord]:
    """Prepare the slides that are missing; return the records of all slides of the folder.

    `ask` tells what the encoders compute on; None: this process does. `only_failed` tries those alone that the last
    report lists as failed. Raises: EngineError with what the user can do; blocks that are written survive any error and
    Ctrl-C.
    """
    paths = slides_of(config)
    folder = Path(config.out)
    with RunLock(folder, "out"):
        records, asked = read_records(folder, PreparedRecord), config.model
        config = settle_config(config, ask or this_process(asked.device))
        shared = set_facts(config)
        open_set(folder, shared)
        hold_settings(config, config.settings())
        damage = config.blocks.slide_damage
        run = SlideRun(
            config, paths, records, PreparedFolder(folder, shared), damage, progress, only_failed, asked.dtype
        )
        done = run.go(
            lambda: start(PrepareStages(config)),
            lambda where, done, facts: write_page(where, shared.magnifications, done, facts),
        )
        return as_prepared(done)
