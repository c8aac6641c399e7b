"""Say how good pictures are: distances between two sets of crops, and what a canvas tells by itself.

    python -m engine.quality RUN SLIDES
    python -m engine.quality RUN SLIDES --patches 64          (and single patches of the same model and conditions)
    python -m engine.quality PICTURES SLIDES --encoder uni --crop_mpp 0.5 --count 2000
    python -m engine.quality RUN                               (detail, seams and agreement alone)
    python -m engine.quality MODEL PREPARED --protocol zoomldm --inception FILE

A and B are runs, pictures, slides, bags of features, or folders of them. Writes OUT/quality.json and OUT/quality.html.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but for some inputs (they are listed), 130 or 143 interrupted.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.core.cli import parse
from engine.core.exits import DONE, PARTLY, USAGE, exit_code
from engine.core.progress import Progress
from engine.evaluation.config import QualityConfig
from engine.evaluation.output import summary, write
from engine.evaluation.protocols import evaluate

PROG = "python -m engine.quality"


def with_names(argv: Sequence[str]) -> list[str]:
    """Name the words before the first flag: A, then B."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))[:2]
    return [*(f"--{name}={word}" for name, word in zip("ab", words, strict=False)), *argv[len(words) :]]


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(with_names(argv), QualityConfig, f"{PROG} A B", (__doc__ or "").splitlines()[0])
    progress = Progress()

    def work() -> int:
        try:
            found = evaluate(config, progress)
        except ValueError as error:
            progress.say(f"engine.quality: {error}")
            return USAGE
        write(found, Path(config.out))
        sys.stdout.write(f"{summary(found)}\n{Path(config.out) / 'quality.html'} shows them beside crops.\n")
        return PARTLY if found.unusable else DONE

    kept = "Nothing was written; run the same command again."
    return exit_code("engine.quality", work, lambda: kept, progress.say)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
