"""Write a folder of synthetic slides: procedural tissue on glass, for demonstrations and measurements.

    python -m engine.phantom_slides --out DIR --count 6

Slides that are there are not made again. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.arguments import parse
from engine.errors import EngineError
from engine.slides.phantom import Phantom
from engine.slides.phantom_slide import write_phantom_slide
from engine.state import disk_error, replacing

PROG = "python -m engine.phantom_slides"


@dataclass(frozen=True)
class PhantomSlidesConfig:
    """How many slides, and of which size."""

    out: str
    """Folder to write into."""
    count: int = 6
    """Slides; number i differs in its tissue only by its seed."""
    width: int = 3072
    """px."""
    height: int = 2048
    """px."""
    mpp: float = 0.5
    """µm/px."""
    seed: int = 0
    """Of the first slide."""
    varied: bool = False
    """Draw each slide's nuclei (calm to pleomorphic) and architecture from its seed, so that all of both occurs; else
    they are those of the default phantom."""
    pen_every: int = 3
    """Every so many slides one has pen marks; 0 for none."""

    def __post_init__(self) -> None:
        if self.count < 1 or min(self.width, self.height) < 256 or not self.mpp > 0:
            raise ValueError(
                f"count >= 1, sides >= 256 px and mpp > 0 must hold; got {self.count}, {self.width}x{self.height}, "
                f"{self.mpp}."
            )
        if self.pen_every < 0:
            raise ValueError(f"pen_every must be 0 (none) or more; got {self.pen_every}.")


def write_slides(config: PhantomSlidesConfig) -> list[Path]:
    """Write the slides that are missing; return all. Raises EngineError if the disk refuses."""
    out = Path(config.out)
    paths = [out / f"phantom_{config.seed + i:03d}.tiff" for i in range(config.count)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, f"{out} cannot be made", out.parent) from error
    for i, path in enumerate(paths):
        if not path.exists():
            with replacing(path) as partial:
                seed, pen = config.seed + i, config.pen_every > 0 and (i + 1) % config.pen_every == 0
                phantom = Phantom.varied(seed) if config.varied else Phantom(seed)
                write_phantom_slide(partial, phantom, config.width, config.height, config.mpp, pen_marks=pen)
    return paths


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, PhantomSlidesConfig, PROG, (__doc__ or "").splitlines()[0])
    try:
        paths = write_slides(config)
    except EngineError as error:
        sys.stderr.write(f"engine.phantom_slides: {error}\n")
        return 1
    sys.stdout.write(f"{len(paths)} slides are in {config.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
