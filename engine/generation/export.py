"""The picture of a run, finished or still at work, written for another program.

A run at work shows its current x0 (network calls, no guidance); its own process is not disturbed.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engine.core.errors import EngineError
from engine.core.files import disk_error
from engine.core.streaming import Box
from engine.generation.preview import crop, find_picture, predict_picture
from engine.generation.run import stored_config
from engine.images.formats import COMPRESSED, ENDINGS, Format, check_ending, write_export
from engine.images.ome_zarr import Image
from engine.images.pyramid import FromLevel, Picture, reduced


@dataclass(frozen=True)
class ExportConfig:
    """What to export, how and where to."""

    run: str
    """Run folder; may be given first, without --run."""
    format: Format
    """tiff (BigTIFF pyramid: OpenSlide, QuPath), ome-tiff (Bio-Formats), ome-zarr, dzi (web), png or jpeg."""
    ngff: Literal["0.4", "0.5"] = "0.5"
    """Version of OME-Zarr; QuPath reads 0.4."""
    region: str | None = None
    """x,y,width,height in px of the base magnification; None takes the whole picture."""
    level: int = 0
    """Leave the finest levels out: level n is 2**n times smaller."""
    max_px: int | None = None
    """Reduce to this longest edge in px, at most 2048: a thumbnail."""
    out: str | None = None
    """File or folder to write; None chooses a name in RUN/exports."""
    compression: Literal["deflate", "jpeg"] | None = None
    """Of tiff, ome-tiff (deflate, which keeps the pixels) and dzi (jpeg)."""
    jpeg_quality: int = 90
    """1..100."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a run at work is predicted and decoded; a finished picture needs no network."""

    def __post_init__(self) -> None:
        _ = self.box
        if self.compression is not None and self.format not in COMPRESSED:
            raise ValueError(f"compression is a choice of {', '.join(COMPRESSED)}; got format={self.format}. Drop it.")
        if self.ngff != "0.5" and self.format != "ome-zarr":
            raise ValueError(f"ngff is the version of ome-zarr; got format={self.format}. Drop it.")
        if self.level and self.max_px is not None:
            raise ValueError("level and max_px exclude each other; got both. Drop one of them.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must lie in 1..100; got {self.jpeg_quality}.")

    @property
    def box(self) -> Box | None:
        """The region in px."""
        return None if self.region is None else Box.parse(self.region)


def export(config: ExportConfig) -> Path:
    """Write the export; return where. Raises EngineError, or ValueError for what the config cannot ask for."""
    folder = Path(config.run)
    if not (folder / "state.json").is_file():
        raise EngineError(f"{folder} must be the folder of a run, with state.json; it is not. Pass output.folder.")
    target = None if config.out is None else Path(config.out)
    if target is not None:
        check_target(target, folder, config.format)
    parent = folder / "exports" if target is None else target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="export.", suffix=".partial", dir=parent) as scratch:
            picture = select(config, run_picture(config, folder, Path(scratch)))
            path = target or parent / default_name(config, picture)
            write_export(path, picture, config.format, config.compression, config.jpeg_quality, config.ngff)
    except OSError as error:
        raise disk_error(error, f"{parent} cannot be written", parent.parent) from error
    return path


def check_target(path: Path, folder: Path, name: Format) -> None:
    """Keep exports out of what a run itself writes. Raises ValueError."""
    check_ending(path, name)
    inside = path.resolve().is_relative_to(folder.resolve())
    if inside and not path.resolve().is_relative_to(folder.resolve() / "exports"):
        raise ValueError(f"names in {folder} belong to the run; got {path}. Use {folder / 'exports'}, or elsewhere.")


def run_picture(config: ExportConfig, folder: Path, scratch: Path) -> Image:
    """Return the run's picture or the region of it, predicted if it is not decoded yet."""
    image, box = find_picture(folder), config.box
    if image is not None:
        return image if box is None else crop(image, box, scratch / "region.ome.zarr")
    run = stored_config(folder)
    if config.device != "auto":
        run = replace(run, model=replace(run.model, device=config.device))
    return predict_picture(folder, run, box, scratch)


def select(config: ExportConfig, picture: Picture) -> Picture:
    """Leave levels out, or reduce."""
    if config.max_px is not None:
        return reduced(picture, config.max_px)
    return FromLevel(picture, config.level) if config.level else picture


def default_name(config: ExportConfig, picture: Picture) -> str:
    """Return a file name that says what is in it."""
    now = picture.provenance.get("unfinished")
    name = "image" if now is None else f"x0_{now['pass']}_{now['steps_done']}"
    if config.box is not None:
        height, width = config.box.size
        name += f"_x{config.box.x0}_y{config.box.y0}_{width}x{height}"
    if config.level:
        name += f"_level{config.level}"
    if config.max_px is not None:
        name += f"_max{config.max_px}"
    if config.ngff != "0.5":
        name += f"_v{config.ngff}"
    return name + ENDINGS[config.format][0]
