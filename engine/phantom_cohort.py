"""Write a synthetic cohort: slides of patients, and the table of labels that command 3 takes.

    python -m engine.phantom_cohort --out DIR --patients 60

A patient is positive if its nuclei are pleomorphic (seen at 20x) AND its architecture is ragged (seen at 5x). Each is
so in the square root of the share of positives, independent of the other, so one of them alone cannot tell. Each scale
is nearly blind to the other sign: nuclei differ in chromatin more than in size, ducts in place and outline more than
in lumina (docs/results/classifier.md).
Slides that are there are not made again. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import sys
from collections.abc import Sequence

from engine.core.cli import parse
from engine.core.exits import DONE, exit_code
from engine.slides.phantom.cohort import PhantomCohortConfig, write_cohort

PROG = "python -m engine.phantom_cohort"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, PhantomCohortConfig, PROG, (__doc__ or "").splitlines()[0])

    def work() -> int:
        slides = write_cohort(config)
        patients = len({slide.patient for slide in slides})
        sys.stdout.write(f"{len(slides)} slides of {patients} patients and labels.csv are in {config.out}\n")
        return DONE

    return exit_code("engine.phantom_cohort", work, lambda: "Run the same command again for the slides left.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
