"""Prepare a multi-scale training set of a folder of slides, in one pass over each magnification's pixels.

    python -m engine.prepare --slides DIR --out DATA
    python -m engine.prepare --slides DIR --out DATA --domain naip --model.source MODEL
    python -m engine.prepare --import_from DIR --out DATA
    python -m engine.prepare --export_to DIR --out DATA

Run the same command again to continue.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but for some slides (they are listed), 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from engine._backends.sampling import ask_hardware
from engine._backends.slides import prepare_on_ray
from engine.core.cli import parse_with_flags
from engine.core.exits import DONE, PARTLY, exit_code
from engine.core.progress import Progress
from engine.datasets.config import PrepareConfig
from engine.datasets.networks import set_facts
from engine.datasets.output import totals
from engine.datasets.prepare import prepare
from engine.datasets.zoomldm_files import export_set, import_set
from engine.pipeline.report import SLIDE_FAILED
from engine.pipeline.stages import local_backend

PROG = "python -m engine.prepare"
FLAGS = {"retry-failed": "try only the slides that the last run lists as failed"}


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, flags = parse_with_flags(argv, PrepareConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)
    progress = Progress()

    def work() -> int:
        if config.slides:
            return _prepare(config, progress, "retry-failed" in flags)
        sys.stdout.write(f"{_listed(_exchange(config))} are in {config.export_to or config.out}.\n")
        return DONE

    kept = f"Every written block is in {config.out}; run the same command again to continue."
    return exit_code("engine.prepare", work, lambda: kept, progress.say)


def _prepare(config: PrepareConfig, progress: Progress, only_failed: bool) -> int:
    start = prepare_on_ray if config.ray.enabled else local_backend
    records = prepare(config, start, progress, only_failed, ask_hardware(config))
    failed = [record for record in records if record.status == SLIDE_FAILED]
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
    return PARTLY if failed else DONE


def _exchange(config: PrepareConfig) -> dict[str, int]:
    """Import or export a set; return the counts of its patches. Raises EngineError."""
    if config.export_to is not None:
        return export_set(Path(config.out), Path(config.export_to))
    return import_set(Path(config.import_from or ""), Path(config.out), set_facts(config))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} at {name}" for name, n in counts.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
