"""Command 3: from bags of features to a classifier with the evidence for it.

    python -m mil.train --task hrd --features features --labels table.csv
    python -m mil.train --task subtyping --features features --labels table.csv --scales 20 --output.folder runs/fine

Run the same command again to continue an interrupted study. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143
interrupted.
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from engine._backends.jobs import on_ray
from engine.core.cli import parse_with_flags
from engine.core.exits import DONE, exit_code, say
from engine.core.runtime import one_by_one
from mil.data.slide_fields import SlideFields
from mil.folds.config import StudyConfig
from mil.study import check, outline, prepare, run

PROG = "python -m mil.train"
FLAGS = {"plan": "check labels, all features and the split, say what would be trained, and stop"}


def main(argv: Sequence[str]) -> int:
    """Parse, check, train, report; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, flags = parse_with_flags(argv, StudyConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)

    def work() -> int:
        study = prepare(config)
        say(outline(study))
        read = None if config.slides is None else SlideFields(Path(config.slides))
        if "plan" in flags:
            check(study)
            return DONE
        map_folds = on_ray(config) if config.ray.enabled else one_by_one
        folder = run(study, map_folds, say, shlex.join([*PROG.split(), *argv]), read)
        sys.stdout.write(f"The report is {folder / 'report.html'}\n")
        return DONE

    return exit_code("mil.train", work, lambda: "Finished folds are kept; run the same command again to continue.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
