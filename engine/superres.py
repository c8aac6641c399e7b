"""A picture of low magnification, enlarged to the base magnification by the model.

    python -m engine.superres IMAGE --scale 4
    python -m engine.superres IMAGE --mpp 2 --config configs/brca.yaml --output.folder runs/enlarged
    python -m engine.superres IMAGE --scale 16 --sampling.start 1000

The picture steers as it is: reduced again, the result is the picture. Other keys are generate_large.py's, and so is
what a run leaves; run the same command again to continue. This module may name `actors`, only inside the function that
is called when Ray is wanted. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Sequence

from engine._command import finish
from engine.core.cli import parse_with_flags
from engine.core.progress import Progress
from engine.generation.superres import SuperresConfig, plan_run

PROG = "python -m engine.superres"
FLAGS = {"plan": "print tiles, batches, network calls, FLOP, memory, disk, dtype and an estimated time, and stop"}
_FROM_PICTURE = ("canvas.height", "canvas.width", "canvas.levels", "condition", "guide")
"""Keys that follow from the picture."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    fixed = [key for key in _FROM_PICTURE if any(word.partition("=")[0] == f"--{key}" for word in argv)]
    if fixed:
        sys.stderr.write(f"{PROG}: --{fixed[0]} follows from the picture; got one. Drop it.\n")
        return 2
    about = (__doc__ or "").splitlines()[0]
    asked, flags = parse_with_flags(argv, SuperresConfig, PROG, about, FLAGS, first="image")
    return finish(PROG, lambda: plan_run(asked), Progress(), plan_only="plan" in flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
