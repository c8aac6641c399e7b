"""Write captioned phantoms: SSL grids of regions, and sentences that say what they show.

    python -m engine.phantom_captions --out DIR --regions 240

The demo's text prior is trained on them (configs/train_demo_text.yaml). A sentence says shares of tissue in words or
percent ("mostly stroma, 20 % fat"), which the phantom knows. Regions that are there are not made again. Exit codes: 0
done, 1 failed, 2 wrong usage.
"""

import logging
import sys
from collections.abc import Sequence

from engine.core.cli import parse
from engine.core.exits import DONE, exit_code
from engine.training.demo.captioned import CaptionedConfig, write_captioned

PROG = "python -m engine.phantom_captions"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, CaptionedConfig, PROG, (__doc__ or "").splitlines()[0])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def work() -> int:
        train, heldout = write_captioned(config)
        sys.stdout.write(f"captions.csv and the grids of its regions are in {train} and {heldout}\n")
        return DONE

    return exit_code("engine.phantom_captions", work, lambda: "Run the same command again for the regions left.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
