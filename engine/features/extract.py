"""The order of an extraction: slides in, bags and a report out; a second run does only what is missing.

Who reads and encodes is the caller's choice (`StartBackend`), so this imports no Ray. The order
itself is engine.pipeline.run's.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from engine.core.files import RunLock
from engine.core.progress import Progress
from engine.core.runtime import Ask, this_process
from engine.features.blocks import ExtractTask
from engine.features.config import ExtractConfig
from engine.features.encoders import describe, scale_names
from engine.features.writer import ExtractionFolder, SlideRecord, as_slides, write_page
from engine.pipeline.report import read_records
from engine.pipeline.run import SlideRun, hold_settings, settle_config, slides_of
from engine.pipeline.stages import Backend

StartBackend = Callable[[ExtractConfig, tuple[str, str]], AbstractContextManager[Backend[ExtractTask]]]
"""Puts the encoders to work on the slides of a config, at two magnifications."""


def extract(
    config: ExtractConfig,
    start: StartBackend,
    progress: Progress,
    only_failed: bool = False,
    ask: Ask | None = None,
    paths: Sequence[Path] | None = None,
) -> list[SlideRecord]:
    """Make the features that are missing; return the records of all slides of the folder.

    `ask` tells what the encoders compute on; None: this process does. `only_failed` tries those alone that the last
    report lists as failed. `paths` name the slides; None takes those of the folder. Raises: EngineError with what the
    user can do; blocks that are written survive any error and Ctrl-C.
    """
    paths = slides_of(config) if paths is None else paths
    folder = Path(config.out)
    with RunLock(folder, "out"):
        records, asked = read_records(folder, SlideRecord), config.model
        config = settle_config(config, ask or this_process(asked.device))
        names, encoders = scale_names(config), describe(config)
        weights = encoders[config.encoders[0]].attributes["weights_sha256"]
        hold_settings(config, {**config.settings(), "weights": weights})
        outputs = ExtractionFolder(folder, config, names, encoders)
        damage = config.blocks.slide_damage
        run = SlideRun(config, paths, records, outputs, damage, progress, only_failed, asked.dtype)
        return as_slides(run.go(lambda: start(config, names), write_page))
