"""Draw single patches at one of the model's magnifications, beside the reference patches they imitate.

    python -m engine.sample --config configs/demo.yaml --magnification 5x --count 16
    python -m engine.sample --condition cdm --magnification 1.25x      (no reference: the CDM draws the conditions too)

Writes one PNG per patch and contact_sheet.png (reference left, drawn right).
Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import sys
from collections.abc import Sequence

from engine.core.cli import parse
from engine.core.exits import DONE, USAGE, exit_code, say
from engine.generation.tiles import UNUSED, SampleConfig, sample


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, SampleConfig, "python -m engine.sample", (__doc__ or "").splitlines()[0])

    plain = SampleConfig()
    unused = [name for name in UNUSED if getattr(config, name) != getattr(plain, name)]
    if unused:
        say(f"engine.sample: {', '.join(unused)} belong to canvases; single tiles do not use them.")

    def work() -> int:
        try:
            sheet = sample(config)
        except ValueError as error:
            say(f"engine.sample: {error}")
            return USAGE
        sys.stdout.write(f"{config.count} tiles are in {config.folder}; {sheet} shows them.\n")
        return DONE

    return exit_code("engine.sample", work, lambda: f"Tiles drawn so far are in {config.folder}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
