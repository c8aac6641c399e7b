"""The viewer: runs at work and finished, slides, and folders of them, in a browser on this machine.

    python -m engine.view runs/demo
    python -m engine.view slides/ --features runs/features --mil runs/mil/hrd
    python -m engine.view runs/ --allow-write

It needs no GPU, no model and no network, and writes nothing; with --allow-write the page may sample a region again,
into a run folder beside the run. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""

import sys
from collections.abc import Sequence

from engine.core.cli import parse_with_flags
from engine.core.exits import DONE, exit_code, say
from engine.viewer.config import ViewConfig
from engine.viewer.server import serve

PROG = "python -m engine.view"
FLAGS = {"allow-write": "let the page sample regions again, into run folders beside their runs"}


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config, flags = parse_with_flags(argv, ViewConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS, first="path")

    def work() -> int:
        server, moved = serve(config, "allow-write" in flags)
        if moved:
            say(moved)
        token = f"?token={config.token}" if config.token else ""
        sys.stdout.write(f"{config.path} is shown at {server.url}{token} until Ctrl-C.\n")
        sys.stdout.flush()
        try:
            server.serve_forever()
        finally:
            server.end()
        return DONE

    return exit_code("engine.view", work, lambda: "The viewer wrote nothing of its own.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
