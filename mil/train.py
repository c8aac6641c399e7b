"""Command 3: from bags of features to a classifier with the evidence for it.

    python -m mil.train --task hrd --features features --labels table.csv
    python -m mil.train --task subtyping --features features --labels table.csv --scales 20 --output.folder runs/fine

Run the same command again to continue an interrupted study. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143
interrupted.
"""

import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.arguments import parse_with_flags
from engine.errors import EngineError
from engine.ray_address import announce_address
from mil.classifier import choose_device
from mil.config import StudyConfig
from mil.folds import FoldJob, MapFolds, one_by_one
from mil.slide_fields import SlideFields
from mil.study import outline, prepare, run

PROG = "python -m mil.train"
FLAGS = {"plan": "check labels, features and split, say what would be trained, and stop"}


def say(text: str) -> None:
    """Print a line for whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str]) -> int:
    """Parse, check, train, report; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, flags = parse_with_flags(argv, StudyConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)
    try:
        study = prepare(config)
        say(outline(study))
        if "plan" in flags:
            return 0
        read = None if config.slides is None else SlideFields(Path(config.slides))
        map_folds = on_ray(config) if config.ray.enabled and len(study.folds) > 1 else one_by_one
        folder = run(study, map_folds, say, shlex.join([*PROG.split(), *argv]), read)
    except EngineError as error:
        say(f"mil.train: {error}")
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:  # actors.cluster turns SIGTERM into SystemExit
        say("Interrupted. Finished folds are kept; run the same command again to continue.")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    sys.stdout.write(f"The report is {folder / 'report.html'}\n")
    return 0


def on_ray(config: StudyConfig) -> MapFolds:
    """Return a MapFolds over the processes of a Ray cluster, or of a private Ray."""

    def map_folds(work: Callable[[FoldJob], str], jobs: Sequence[FoldJob]) -> Iterator[str]:
        if len(jobs) < 2:  # nothing to do side by side
            yield from one_by_one(work, jobs)
            return
        announce_address(config.ray.address)
        from actors.cluster import connect  # Ray is imported only by studies that use it
        from actors.folds import do_jobs

        gpus = config.ray.gpus_per_replica if choose_device(config.device).type == "cuda" else 0
        with connect(config.ray):
            yield from do_jobs(work, jobs, num_cpus=config.threads, num_gpus=gpus, attempts=config.ray.max_attempts)

    return map_folds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
