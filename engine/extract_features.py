"""Extract features of a folder of slides at two magnifications in one pass over the pixels.

    python -m engine.extract_features --slides DIR --out DIR
    python -m engine.extract_features --slides DIR --dry-run
    python -m engine.extract_features --slides DIR --out DIR --retry-failed

Run the same command again to continue.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but for some slides (they are listed), 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from engine._backends.sampling import ask_hardware
from engine._backends.slides import extract_on_ray
from engine.core.cli import parse_with_flags
from engine.core.exits import DONE, PARTLY, exit_code
from engine.core.progress import Progress
from engine.features.config import ExtractConfig
from engine.features.encoders import extract_alone
from engine.features.extract import extract
from engine.pipeline.report import SLIDE_FAILED
from engine.pipeline.run import slides_of
from engine.slides.inspect import format_table, inspect_slides, write_csv
from engine.slides.resolution import read_overrides

PROG = "python -m engine.extract_features"
FLAGS = {
    "dry-run": "open every slide, print what is known of it, write the same to OUT/slides.csv, and stop",
    "retry-failed": "try only the slides that the last run lists as failed",
}


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, flags = parse_with_flags(argv, ExtractConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)
    progress = Progress()
    kept = f"Every written block is in {config.out}; run the same command again to continue."
    work = partial(_work, config, flags, progress)
    return exit_code("engine.extract_features", work, lambda: kept, progress.say)


def _work(config: ExtractConfig, flags: frozenset[str], progress: Progress) -> int:
    if "dry-run" in flags:
        return dry_run(config)
    start = extract_on_ray if config.ray.enabled else extract_alone
    records = extract(config, start, progress, "retry-failed" in flags, ask_hardware(config))
    failed = [record for record in records if record.status == SLIDE_FAILED]
    sys.stdout.write(f"{len(records) - len(failed)} of {len(records)} slides are in {config.out}: see report.html.\n")
    for record in failed:
        sys.stdout.write(f"failed ({record.code}): {record.slide}\n")
    if failed:
        sys.stdout.write("Mend them, then run the command with --retry-failed.\n")
    return PARTLY if failed else DONE


def dry_run(config: ExtractConfig) -> int:
    """Print the table of slides and write it as CSV; 3 if some cannot be used. Raises EngineError."""
    overrides = None if config.overrides is None else read_overrides(Path(config.overrides))
    how = config.finder, config.grid, overrides, config.mpp, config.series, config.blocks.slide_damage
    rows = list(inspect_slides(slides_of(config), *how))
    table = Path(config.out) / "slides.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    write_csv(table, rows)
    sys.stdout.write(f"{format_table(rows)}\nThe same as CSV: {table}\n")
    return 0 if all(row.usable for row in rows) else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
