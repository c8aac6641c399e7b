"""Draw many pictures, or bags, as one job: from a table with one row per picture, or variations of a folder of slides.

    python -m engine.generate_cohort --config configs/cohort_demo.yaml
    python -m engine.generate_cohort --table rows.csv --slides DIR --out DIR --plan
    python -m engine.generate_cohort --slides DIR --recipe.labels labels.csv --recipe.variations 10 --out DIR
    python -m engine.generate_cohort --table rows.csv --out DIR --bags_only true --bags.tiles 1000
    python -m engine.generate_cohort --table rows.csv --out DIR --retry-failed

Run the same command again to continue.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but for some rows (they are listed), 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from engine._backends.cohort import make_on_ray
from engine._backends.sampling import ask_hardware
from engine.cohort.config import CohortConfig
from engine.cohort.output import DONE as ROW_DONE
from engine.cohort.output import FAILED as ROW_FAILED
from engine.cohort.plan import plan_text
from engine.cohort.run import make_alone, make_cohort, rows_of
from engine.cohort.table import BadRow
from engine.core.cli import parse_with_flags
from engine.core.exits import DONE, PARTLY, exit_code
from engine.core.progress import Progress
from engine.core.runtime import UNSEEN_GPU, choose_device, hardware_of, settle_dtype
from engine.generation.run import describe

PROG = "python -m engine.generate_cohort"
FLAGS = {
    "plan": "look every row up, print pictures, px, costs and the rows that cannot be made, and stop",
    "dry-run": "the same as --plan",
    "retry-failed": "try only the rows that the last run lists as failed",
}


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, flags = parse_with_flags(argv, CohortConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)
    progress = Progress()
    kept = f"What is made, and every finished step of the others, is in {config.out}; run the same command again."
    return exit_code("engine.generate_cohort", partial(_work, config, flags, progress), lambda: kept, progress.say)


def _work(config: CohortConfig, flags: frozenset[str], progress: Progress) -> int:
    if flags & {"plan", "dry-run"}:
        return _plan(config)
    start = make_on_ray if config.ray.enabled else make_alone
    records = make_cohort(config, start, progress, "retry-failed" in flags, ask_hardware(config))
    done = [record for record in records if record.status == ROW_DONE]
    failed = [record for record in records if record.status == ROW_FAILED]
    what = "bags" if config.bags_only else "pictures"
    sys.stdout.write(f"{len(done)} of {len(records)} {what} are in {config.out}: see report.html.\n")
    for record in failed:
        sys.stdout.write(f"failed ({record.reason}): {record.name}\n")
    if failed:
        sys.stdout.write("Mend them, then run the command with --retry-failed.\n")
    return DONE if len(done) == len(records) else PARTLY


def _plan(config: CohortConfig) -> int:
    """Print the plan; 3 if some rows cannot be made. Raises EngineError."""
    unseen = config.model.device == "cuda" and not torch.cuda.is_available()
    hardware = UNSEEN_GPU if unseen else hardware_of(choose_device(config.model.device))
    dtype = settle_dtype(config.model.dtype, lambda: None, lambda: hardware)
    config = replace(config, model=replace(config.model, dtype=dtype))  # type: ignore[arg-type]  # one of the key's
    model = describe(config.model)
    asked = rows_of(config, model)
    sys.stdout.write(plan_text(config, asked, model, hardware.device) + "\n")
    return PARTLY if any(isinstance(row, BadRow) for row in asked) else DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
