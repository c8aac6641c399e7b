"""Train a ZoomLDM, its single-scale predecessor or the autoencoder on a prepared set; a CDM; the demo on phantoms.

    python -m engine.train --config configs/train_brca.yaml --data DATA --initial.vae FOLDER
    python -m engine.train --config configs/train_brca.yaml --plan
    python -m engine.train --config configs/train_brca.yaml --run RUN --export
    python -m engine.train --config configs/train_demo.yaml

`task` in the configuration says what is trained; --plan and --export are of the tasks on a prepared set, denoiser and
autoencoder. The same command continues a run that was killed. This module may name `actors`, and only inside the
function that is called when Ray is wanted.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.arguments import parse, parse_with_flags, peek
from engine.config import RayConfig
from engine.environment import this_process
from engine.errors import EngineError
from engine.interruption import sigterm_as_exit
from engine.lock import RunLock
from engine.ray_address import announce_address
from engine.training.cost import training_table
from engine.training.precision import settle_precision
from engine.training.tasks import TASKS, PreparedConfig, learn

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
    if not config.ray.enabled:
        return _logged(config, lambda c: learn(settle_precision(c, this_process(c.device))))
    return _logged(config, learn_on_ray)


def _plan(config: PreparedConfig) -> int:
    try:
        config = settle_precision(config, this_process(config.device))
        sys.stdout.write(training_table(config) + "\n")
    except EngineError as error:
        sys.stderr.write(f"engine.train: {error}\n")
        return 1
    return 0


def _logged(config: Any, work: Callable[[Any], None]) -> int:
    """Do the work with a log on the terminal and in the run folder, which belongs to it; return the exit code."""
    folder = Path(config.run)
    try:
        with RunLock(folder, "run"), _log_in(folder), sigterm_as_exit():
            work(config)
    except EngineError as error:
        sys.stderr.write(f"engine.train: {error}\n")
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:  # actors.cluster turns SIGTERM into SystemExit too
        sys.stderr.write(f"Interrupted. The last checkpoint is in {folder}; run the same command again to continue.\n")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    return 0


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


def learn_on_ray(config: PreparedConfig) -> None:
    """Train on the workers of a Ray cluster, or of a private Ray."""
    announce_address(config.ray.address)
    from actors.hardware import hardware_of_replicas  # Ray is imported only by runs that use it
    from actors.training import train_on_ray

    asked = RayConfig(address=config.ray.address)
    train_on_ray(settle_precision(config, lambda: hardware_of_replicas(asked, config.device)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
