"""Tile-level probe: logistic regression and a perceptron on vectors of pictures, one folder of pictures per class.

    python -m mil.probe --task crc --data NCT-CRC-HE-100K --test CRC-VAL-HE-7K --encoder uni
    python -m mil.probe --task mhist --data annotations.csv --encoder zoomldm

Run the same command again to continue. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Sequence

from engine.core.cli import parse_with_flags
from engine.core.exits import DONE, exit_code, say
from mil.tiles.study import ProbeConfig, check_folder, prepare, run, told

PROG = "python -m mil.probe"
FLAGS = {"plan": "check pictures, classes and the division, say what would be done, and stop"}


def main(argv: Sequence[str]) -> int:
    """Parse, check, encode, fit, report; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, flags = parse_with_flags(argv, ProbeConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)

    def work() -> int:
        probe = prepare(config)
        say(told(probe))
        if "plan" in flags:
            check_folder(probe.folder)
            return DONE
        sys.stdout.write(f"The report is {run(probe, say) / 'report.html'}\n")
        return DONE

    return exit_code("mil.probe", work, lambda: "Finished blocks of vectors are kept; run the same command again.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
