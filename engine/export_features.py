"""Export the features of slides in the layout of another program.

    python -m engine.export_features RUN --layout trident --magnification 20
    python -m engine.export_features RUN --layout clam --magnification 5 --out /data/clam

RUN is the output folder of an extraction. Tiles that could not be read are left out.
Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.core.cli import parse
from engine.core.exits import DONE, exit_code
from engine.features.bag_reader import SUFFIX
from engine.features.bag_writer import BLOCKS, find_unfinished
from engine.features.export import ExportFeaturesConfig, export_features

PROG = "python -m engine.export_features"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, ExportFeaturesConfig, PROG, (__doc__ or "").splitlines()[0], first="run")

    def work() -> int:
        out, count = export_features(config)
        sys.stdout.write(f"{out}: {count} slides at {config.scale} in the layout of {config.layout}\n")
        if unfinished := find_unfinished(Path(config.run) / config.features):
            names = ", ".join(path.name.removesuffix(SUFFIX + BLOCKS) for path in unfinished[:5])
            sys.stdout.write(
                f"Left out: {len(unfinished)} unfinished slides ({names}). Finish the extraction, then export.\n"
            )
        return DONE

    return exit_code("engine.export_features", work, lambda: "Run the same command again for the files left.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
