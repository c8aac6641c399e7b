"""The order of an extraction: slides in, bags and a report out; a second run does only what is missing.

Who reads and encodes is the caller's choice (`Engage`), so this imports no Ray. The order itself is slide_run.py's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from engine.devices import Ask
from engine.environment import this_process
from engine.extraction_config import ExtractConfig
from engine.extraction_encoders import describe, scale_names
from engine.extraction_outputs import ExtractionOutputs
from engine.extraction_report import SlideRecord, write_page
from engine.lock import RunLock
from engine.progress import Progress
from engine.slide_crew import Crew
from engine.slide_report import read_records
from engine.slide_run import SlideRun, hold_settings, settle_config, slides_of

Engage = Callable[[ExtractConfig, tuple[str, str]], AbstractContextManager[Crew]]
"""Puts the encoders to work on the slides of a config, at two magnifications."""


def extract(
    config: ExtractConfig, engage: Engage, progress: Progress, only_failed: bool = False, ask: Ask | None = None
) -> list[SlideRecord]:
    """Make the features that are missing; return the records of all slides of the folder.

    `ask` tells what the encoders compute on; None: this process does. `only_failed` tries those alone that the last
    report lists as failed. Raises: EngineError with what the user can do; blocks that are written survive any error and
    Ctrl-C.
    """
    paths = slides_of(config)
    folder = Path(config.out)
    with RunLock(folder, "out"):
        records, asked = read_records(folder, SlideRecord), config.model
        config = settle_config(config, ask or this_process(asked.device))
        names, encoders = scale_names(config), describe(config)
        weights = encoders[config.encoders[0]].attributes["weights_sha256"]
        hold_settings(config, {**config.settings(), "weights": weights})
        outputs = ExtractionOutputs(folder, config, names, encoders)
        run = SlideRun(config, paths, records, outputs, progress, only_failed, asked.dtype)
        return run.go(lambda: engage(config, names), write_page)
