"""Extract features of a folder of slides at two magnifications in one pass over the pixels.

    python -m engine.extract_features --slides DIR --out DIR
    python -m engine.extract_features --slides DIR --dry-run
    python -m engine.extract_features --slides DIR --out DIR --retry-failed

Run the same command again to continue. This module may name `actors`, and only inside the function that is called when
Ray is wanted.
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
from engine.extraction import extract
from engine.extraction_config import ExtractConfig
from engine.extraction_local import ExtractStages, extract_alone
from engine.progress import Progress
from engine.ray_address import announce_address
from engine.slide_crew import Crew
from engine.slide_report import FAILED
from engine.slide_run import slides_of
from engine.slides.resolution import read_overrides
from engine.slides.table import format_table, inspect_slides, write_csv

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
    try:
        if "dry-run" in flags:
            return dry_run(config)
        engage, ask = (extract_on_ray, partial(ask_ray, config)) if config.ray.enabled else (extract_alone, None)
        records = extract(config, engage, progress, "retry-failed" in flags, ask)
    except EngineError as error:
        progress.say(f"engine.extract_features: {error}")
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:  # actors.cluster turns SIGTERM into SystemExit
        progress.say(f"Interrupted. Every written block is in {config.out}; run the same command again to continue.")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    failed = [record for record in records if record.status == FAILED]
    sys.stdout.write(f"{len(records) - len(failed)} of {len(records)} slides are in {config.out}: see report.html.\n")
    for record in failed:
        sys.stdout.write(f"failed ({record.code}): {record.slide}\n")
    if failed:
        sys.stdout.write("Mend them, then run the command with --retry-failed.\n")
    return 3 if failed else 0


def dry_run(config: ExtractConfig) -> int:
    """Print the table of slides and write it as CSV; 3 if some cannot be used. Raises EngineError."""
    overrides = None if config.overrides is None else read_overrides(Path(config.overrides))
    rows = list(inspect_slides(slides_of(config), config.finder, config.grid, overrides, config.mpp))
    table = Path(config.out) / "slides.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    write_csv(table, rows)
    sys.stdout.write(f"{format_table(rows)}\nThe same as CSV: {table}\n")
    return 0 if all(row.usable for row in rows) else 3


@contextmanager
def extract_on_ray(config: ExtractConfig, names: tuple[str, str]) -> Iterator[Crew]:
    """Compute on the replicas of a Ray cluster, or of a private Ray."""
    announce_address(config.ray.address)
    from actors.cluster import connect  # Ray is imported only by runs that use it
    from actors.slide_pipeline import work_on_ray

    with connect(config.ray):
        yield work_on_ray(ExtractStages(config, names))


def ask_ray(config: ExtractConfig) -> Hardware:
    """Find out what the replicas of a Ray cluster, or of a private Ray, compute on."""
    announce_address(config.ray.address)
    from actors.hardware import hardware_of_replicas

    return hardware_of_replicas(config.ray, config.model.device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
