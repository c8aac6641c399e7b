"""The order of a preparation: slides in, a training set and a report out; a second run does only what is missing.

Who reads and encodes is the caller's choice (`Engage`), so this imports no Ray. The order itself is slide_run.py's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from engine.devices import Ask
from engine.environment import this_process
from engine.lock import RunLock
from engine.preparation_blocks import PrepareStages
from engine.preparation_config import PrepareConfig
from engine.preparation_encoders import set_facts
from engine.preparation_outputs import PreparedOutputs
from engine.preparation_report import PreparedRecord, write_page
from engine.prepared_writer import open_set
from engine.progress import Progress
from engine.slide_crew import Crew
from engine.slide_report import read_records
from engine.slide_run import SlideRun, hold_settings, settle_config, slides_of

Engage = Callable[[PrepareStages], AbstractContextManager[Crew]]


def prepare(
    config: PrepareConfig, engage: Engage, progress: Progress, only_failed: bool = False, ask: Ask | None = None
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
        outputs = PreparedOutputs(folder, config, shared)
        run = SlideRun(config, paths, records, outputs, progress, only_failed, asked.dtype)
        return run.go(
            lambda: engage(PrepareStages(config)),
            lambda where, done, facts: write_page(where, shared.magnifications, done, facts),
        )
