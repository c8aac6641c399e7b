"""A folder of phantom slides."""

from dataclasses import dataclass
from pathlib import Path

from engine.core.files import disk_error, replacing
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.slide import write_phantom_slide


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
