"""Draw where a model looked on a slide: PNG over the thumbnail and GeoJSON for QuPath.

    python -m mil.heatmap runs/mil/hrd --slide SLIDE
    python -m mil.heatmap runs/mil/hrd --slide SLIDE --features features --picture thumbnail.jpg

A slide that the study tested is drawn from the attention stored then; any other one needs --features, and is judged by
all folds. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import yaml
from PIL import Image, UnidentifiedImageError

from engine.arguments import parse
from engine.errors import EngineError
from engine.state import write_atomically
from mil.cohort import check_scales
from mil.dataset import BagCache, StoredBag
from mil.errors import RunError
from mil.featurefiles import find_features, open_features
from mil.folds import write_attention
from mil.overlay import AttentionMap, draw, geojson
from mil.saved import load_models

PROG = "python -m mil.heatmap"


@dataclass(frozen=True)
class HeatmapConfig:
    """Which slide is drawn, and how."""

    model: str
    """Run folder of mil.train, or one fold's folder in it; may be given first, without --model."""
    slide: str
    """Name of the slide, as in the table of labels."""
    features: str | None = None
    """Folder of features files, for a slide that the study did not test."""
    picture: str | None = None
    """Thumbnail of the whole slide; None looks for thumbnails/SLIDE.jpg or .png beside the features."""
    tile_level0_px: float | None = None
    """Side of a tile in level-0 px, for features files that do not say (CLAM)."""
    max_px: int = 2048
    """Longest edge of the PNG, px."""
    out: str | None = None
    """Path without ending; None writes MODEL/heatmaps/SLIDE.png and .geojson."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes, if it has to."""

    def __post_init__(self) -> None:
        if self.max_px < 64:
            raise ValueError(f"max_px must be at least 64; got {self.max_px}.")


def stored_map(config: HeatmapConfig) -> AttentionMap | None:
    """Return the attention stored when the slide was tested, mean over repeats; None if it was not."""
    run = Path(config.model)
    files = [run / "attention.h5"] if (run / "fold.json").is_file() else sorted(run.glob("folds/*/attention.h5"))
    groups = []
    for path in files:
        with h5py.File(path, "r") as file:
            if config.slide in file:
                groups.append(_read_group(file[config.slide], config))  # type: ignore[arg-type]
    if not groups:
        return None
    mean = np.mean([group.attention for group in groups], axis=0)
    return AttentionMap(config.slide, mean, groups[0].coords, groups[0].tile, groups[0].size)


def _read_group(group: h5py.Group, config: HeatmapConfig) -> AttentionMap:
    if "coords" not in group:
        raise RunError(
            f"{config.slide} must have coordinates in level-0 px to be drawn; its features file has none. Use features "
            "that keep them (ours, TRIDENT's, CLAM's h5_files)."
        )
    side = group.attrs.get("tile_level0_px", None if config.tile_level0_px is None else [config.tile_level0_px] * 2)
    if side is None:
        raise RunError(
            f"the tile size of {config.slide} must be known; its features file does not say. Pass --tile_level0_px."
        )
    size = group.attrs.get("level0_size")
    level0 = None if size is None else (int(size[0]), int(size[1]))
    tile = (float(side[0]), float(side[1]))
    return AttentionMap(config.slide, np.asarray(group["attention"], float), np.asarray(group["coords"]), tile, level0)


def computed_map(config: HeatmapConfig) -> AttentionMap:
    """Judge the slide by all folds and return their mean attention. Raises EngineError."""
    folds = load_models(Path(config.model), config.device)
    if config.features is None:
        raise RunError(
            f"{config.slide} was not tested by {config.model}, so no attention of it is stored. Pass --features "
            "DIR, or the name of a tested slide."
        )
    files = find_features(Path(config.features))
    if config.slide not in files:
        raise RunError(f"{config.features} must hold features of {config.slide}; it does not. Extract the slide.")
    path, facts = files[config.slide], folds[0].facts
    file = open_features(path)
    check_scales(path, file.scales, facts.scales)
    folds[0].check(file)
    widths = tuple(file.shape(scale)[1] for scale in facts.scales)
    file.close()
    bag = StoredBag(path, facts.scales, widths, BagCache(2**40))  # read once for all folds
    if not len(bag.read()):
        raise RunError(f"{config.slide} has no tiles, so there is nothing to draw.")
    attention = np.mean([next(fold.classifier.attention_maps([bag])) for fold in folds], axis=0)
    with h5py.File(io.BytesIO(), "w") as memory:
        write_attention(memory, config.slide, path, facts.scales, 0.0, attention)
        return _read_group(memory[config.slide], config)  # type: ignore[arg-type]


def thumbnail_of(config: HeatmapConfig, found: AttentionMap) -> Image.Image | None:
    """Return the picture to draw on, or None when there is none. Raises RunError for one that cannot be placed."""
    path = Path(config.picture) if config.picture is not None else _beside_features(config)
    if path is None:
        return None
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, UnidentifiedImageError) as error:
        raise RunError(
            f"--picture must be a PNG or JPEG of the whole slide; {path} cannot be read: {error}."
        ) from error
    if found.size is None:
        raise RunError(
            f"a thumbnail needs the slide's size, which the features file of {config.slide} does not say. Leave "
            "--picture out to draw on white."
        )
    ratio = (picture.width / picture.height) / (found.size[0] / found.size[1])
    if not 0.95 < ratio < 1.05:
        raise RunError(
            f"the thumbnail must show the whole slide, {found.size[0]} x {found.size[1]} px at level 0; {path} has "
            f"another shape, {picture.width} x {picture.height}. Use a picture of this slide."
        )
    return picture


def _beside_features(config: HeatmapConfig) -> Path | None:
    folder, run = config.features, Path(config.model)
    for settings in (run / "config.yaml", run.parent.parent / "config.yaml"):
        if folder is None and settings.is_file():
            folder = yaml.safe_load(settings.read_text())["features"]
    if folder is None:
        return None
    places = [Path(folder) / "thumbnails", Path(folder).parent / "thumbnails"]
    candidates = [place / f"{config.slide}{ending}" for place in places for ending in (".jpg", ".jpeg", ".png")]
    return next((path for path in candidates if path.is_file()), None)


def write_heatmap(config: HeatmapConfig) -> tuple[Path, Path, bool]:
    """Write PNG and GeoJSON; return where, and whether there was a thumbnail. Raises EngineError."""
    torch.set_num_threads(1)
    found = stored_map(config) or computed_map(config)
    thumbnail = thumbnail_of(config, found)
    base = Path(config.out) if config.out is not None else Path(config.model) / "heatmaps" / config.slide
    base.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    draw(found, thumbnail, config.max_px).save(data, "png")
    png, shapes = base.with_name(base.name + ".png"), base.with_name(base.name + ".geojson")
    write_atomically(png, data.getvalue())
    write_atomically(shapes, geojson(found).encode())
    return png, shapes, thumbnail is not None


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, HeatmapConfig, PROG, (__doc__ or "").splitlines()[0], first="model")
    try:
        png, shapes, has_thumbnail = write_heatmap(config)
    except EngineError as error:
        sys.stderr.write(f"mil.heatmap: {error}\n")
        return 1
    if not has_thumbnail:
        sys.stderr.write("mil.heatmap: no thumbnail beside the features and no --picture; drawn on white.\n")
    sys.stdout.write(f"{png}\n{shapes}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
