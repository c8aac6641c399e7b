"""Write a folder of synthetic slides: procedural tissue on glass, for demonstrations and measurements.

    python -m engine.phantom_slides --out DIR --count 6

Slides that are there are not made again. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import sys
from collections.abc import Sequence

from engine.core.cli import parse
from engine.core.exits import DONE, exit_code
from engine.slides.phantom.folder import PhantomSlidesConfig, write_slides

PROG = "python -m engine.phantom_slides"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, PhantomSlidesConfig, PROG, (__doc__ or "").splitlines()[0])

    def work() -> int:
        sys.stdout.write(f"{len(write_slides(config))} slides are in {config.out}\n")
        return DONE

    return exit_code("engine.phantom_slides", work, lambda: "Run the same command again for the slides left.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
