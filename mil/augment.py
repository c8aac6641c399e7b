"""Does synthetic data help? Train on real bags, and on them with synthetic ones, beside controls, on the same patients.

    python -m mil.augment --task hrd --features features --labels table.csv --wanted rows.csv
    python -m mil.augment --task hrd --features features --labels table.csv --synthetic synthetic/
    python -m mil.augment --task hrd --features features --labels table.csv --synthetic synthetic/ --plan

Arms at each fraction of the training patients: real, real twice, real + feature noise, real + synthetic, synthetic
only. Run the same command again to continue. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""

import logging
import shlex
import sys
from collections.abc import Sequence

from engine._backends.jobs import on_ray
from engine.core.cli import parse_with_flags
from engine.core.exits import DONE, exit_code, say
from engine.core.runtime import one_by_one
from mil.augmentation.config import AugmentConfig
from mil.augmentation.protocol import MARKER, plan, real_folds, run, told
from mil.augmentation.wanted import write_wanted
from mil.study import check_folder, read_through

PROG = "python -m mil.augment"
FLAGS = {"plan": "check labels, all bags, the split and the arms, say what would be trained, and stop"}


def main(argv: Sequence[str]) -> int:
    """Parse, check, train, report; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, flags = parse_with_flags(argv, AugmentConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)

    def work() -> int:
        if config.wanted is not None:
            sys.stdout.write(write_wanted(config, *real_folds(config)))
            return DONE
        planned = plan(config)
        say(told(planned))
        if "plan" in flags:
            check_folder(planned.folder, MARKER)
            read_through(planned.study)
            return DONE
        map_trials = on_ray(config) if config.ray.enabled else one_by_one
        folder = run(planned, map_trials, say, shlex.join([*PROG.split(), *argv]))
        sys.stdout.write((folder / "augmentation.txt").read_text())
        sys.stdout.write(f"The report is {folder / 'report.html'}\n")
        return DONE

    return exit_code(
        "mil.augment", work, lambda: "Finished trainings are kept; run the same command again to continue."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
