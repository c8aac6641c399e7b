"""Train a ZoomLDM, its single-scale predecessor or the autoencoder on a prepared set; a CDM; the demo on phantoms.

    python -m engine.train --config configs/train_brca.yaml --data DATA --initial.vae FOLDER
    python -m engine.train --config configs/train_brca.yaml --plan
    python -m engine.train --config configs/train_brca.yaml --run RUN --export
    python -m engine.train --config configs/train_demo.yaml

`task` in the configuration says what is trained; --plan and --export are of the tasks on a prepared set, denoiser and
autoencoder. The same command continues a run that was killed.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine._backends.training import train_model
from engine.core.cli import parse, parse_with_flags, peek
from engine.core.errors import EngineError
from engine.core.exits import DONE, exit_code
from engine.core.files import RunLock
from engine.core.runtime import this_process
from engine.training.cost import training_table
from engine.training.precision import settle_precision
from engine.training.tasks import TASKS, PreparedConfig

log = logging.getLogger("engine.train")

PROG = "python -m engine.train"
DESCRIPTION = (__doc__ or "").partition("\n")[0]
FLAGS = {
    "plan": "print parameters, memory and FLOP of a step and the patches of the set, and stop",
    "export": "write the model of the last checkpoint as `output` says, and stop",
}


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    name = peek(argv, "task", list(TASKS), PROG)
    task = TASKS[name]
    if (export := task.export) is None:
        if given := [f"--{flag}" for flag in FLAGS if f"--{flag}" in argv]:
            others = " or ".join(other for other, that in TASKS.items() if that.export is not None)
            sys.stderr.write(f"{PROG}: {given[0]} needs the task {others}; task is {name}. Leave {given[0]} out.\n")
            return 2
        return _logged(parse(argv, task.schema, PROG, DESCRIPTION), task.train)
    config, flags = parse_with_flags(argv, task.schema, PROG, DESCRIPTION, FLAGS)
    if "plan" in flags:
        return _plan(config)
    if "export" in flags:
        return _logged(config, lambda c: export(settle_precision(c, this_process(c.device))))
    return _logged(config, train_model)


def _plan(config: PreparedConfig) -> int:
    def work() -> int:
        sys.stdout.write(training_table(settle_precision(config, this_process(config.device))) + "\n")
        return DONE

    return exit_code("engine.train", work, lambda: "Nothing was written.")


def _logged(config: Any, work: Callable[[Any], None]) -> int:
    """Do the work with a log on the terminal and in the run folder, which belongs to it; return the exit code."""
    folder = Path(config.run)

    def logged() -> int:
        with RunLock(folder, "run"), _log_in(folder):
            work(config)
        return DONE

    kept = f"The last checkpoint is in {folder}; run the same command again to continue."
    return exit_code("engine.train", logged, lambda: kept)


@contextmanager
def _log_in(folder: Path) -> Iterator[None]:
    form, logger = logging.Formatter("%(asctime)s %(name)s %(message)s", "%H:%M:%S"), logging.getLogger("engine")
    handlers = [logging.StreamHandler(), logging.FileHandler(folder / "log.txt")]
    for handler in handlers:
        handler.setFormatter(form)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except EngineError as error:
        handlers[1].handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (error,), None))
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
