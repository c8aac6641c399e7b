"""Export the picture of a run, finished or still at work, for another program.

    python -m engine.export RUN --format ome-tiff
    python -m engine.export RUN --format jpeg --region 4096,2048,1024,1024
    python -m engine.export RUN --format png --max_px 1000

A run at work shows its current x0 (network calls, no guidance); its own process is not disturbed.
Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import sys
from collections.abc import Sequence

from engine.core.cli import parse
from engine.core.exits import DONE, USAGE, exit_code, say
from engine.generation.export import ExportConfig, export

PROG = "python -m engine.export"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, ExportConfig, PROG, (__doc__ or "").splitlines()[0], first="run")

    def work() -> int:
        try:
            path = export(config)
        except ValueError as error:
            say(f"engine.export: {error}")
            return USAGE
        sys.stdout.write(f"{path}\n")
        return DONE

    return exit_code("engine.export", work, lambda: "Nothing was written; run the same command again.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
