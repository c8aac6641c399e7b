"""Prepare a multi-scale training set of a folder of slides, in one pass over each magnification's pixels.

    python -m engine.prepare --slides DIR --out DATA
    python -m engine.prepare --slides DIR --out DATA --domain naip --model.source MODEL
    python -m engine.prepare --import_from DIR --out DATA
    python -m engine.prepare --export_to DIR --out DATA

Run the same command again to continue. It may name `actors` only inside the function that is called when Ray is wanted.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but for some slides (they are listed), 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from engine.arguments import parse_with_flags
from engine.devices import Hardware
from engine.errors import EngineError
from engine.preparation import prepare
from engine.preparation_blocks import PrepareStages
from engine.preparation_config import PrepareConfig
from engine.preparation_encoders import set_facts
from engine.preparation_report import totals
from engine.progress import Progress
from engine.published_files import export_set, import_set
from engine.ray_address import announce_address
from engine.slide_crew import Crew, work_alone
from engine.slide_report import FAILED

PROG = "python -m engine.prepare"
FLAGS = {"retry-failed": "try only the slides that the last run lists as failed"}


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, flags = parse_with_flags(argv, PrepareConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)
    progress = Progress()
    try:
        if config.slides:
            return _prepare(config, progress, "retry-failed" in flags)
        counts = _exchange(config)
    except EngineError as error:
        progress.say(f"engine.prepare: {error}")
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:  # actors.cluster turns SIGTERM into SystemExit
        progress.say(f"Interrupted. Every written block is in {config.out}; run the same command again to continue.")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    sys.stdout.write(f"{_listed(counts)} are in {config.export_to or config.out}.\n")
    return 0


def _prepare(config: PrepareConfig, progress: Progress, only_failed: bool) -> int:
    engage, ask = (prepare_on_ray, partial(ask_ray, config)) if config.ray.enabled else (work_alone, None)
    records = prepare(config, engage, progress, only_failed, ask)
    failed = [record for record in records if record.status == FAILED]
    counts = totals(records, config.scale.names)
    sys.stdout.write(
        f"{len(records) - len(failed)} of {len(records)} slides are in {config.out}: see report.html.\n"
        f"Patches: {_listed(counts)}.\n"
    )
    if empty := [name for name, n in counts.items() if not n]:
        sys.stdout.write(
            f"None at {', '.join(empty)}: the slides are too small or have too little tissue there. Add larger ones, "
            "lower --min_tissue, or stop at a finer --coarsest (in another --out).\n"
        )
    for record in failed:
        sys.stdout.write(f"failed ({record.code}): {record.slide}\n")
    if failed:
        sys.stdout.write("Mend them, then run the command with --retry-failed.\n")
    return 3 if failed else 0


def _exchange(config: PrepareConfig) -> dict[str, int]:
    """Import or export a set; return the counts of its patches. Raises EngineError."""
    if config.export_to is not None:
        return export_set(Path(config.out), Path(config.export_to))
    return import_set(Path(config.import_from or ""), Path(config.out), set_facts(config))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} at {name}" for name, n in counts.items())


@contextmanager
def prepare_on_ray(stages: PrepareStages) -> Iterator[Crew]:
    """Compute on the replicas of a Ray cluster, or of a private Ray."""
    announce_address(stages.config.ray.address)
    from actors.cluster import connect  # Ray is imported only by runs that use it
    from actors.slide_pipeline import work_on_ray

    with connect(stages.config.ray):
        yield work_on_ray(stages)


def ask_ray(config: PrepareConfig) -> Hardware:
    """Find out what the replicas of a Ray cluster, or of a private Ray, compute on."""
    announce_address(config.ray.address)
    from actors.hardware import hardware_of_replicas

    return hardware_of_replicas(config.ray, config.model.device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
