"""Draw where a model looked on a slide: PNG over the thumbnail and GeoJSON for QuPath.

    python -m mil.heatmap runs/mil/hrd --slide SLIDE
    python -m mil.heatmap runs/mil/hrd --slide SLIDE --features features --picture thumbnail.jpg

Of more than two classes there is a further PNG for each: what the folds see in each tile by itself. A slide that the
study tested is drawn from the attention stored then; any other one needs --features, and is judged by
all folds. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import yaml
from PIL import Image, UnidentifiedImageError

from engine.core.cli import parse
from engine.core.exits import DONE, exit_code, say
from engine.core.files import write_atomically
from mil.data.feature_files import find_features
from mil.data.names import match_names, near_names
from mil.errors import RunError
from mil.fit.store import load_facts, load_models
from mil.folds.folds import write_attention, write_classes
from mil.report.overlay import AttentionMap, draw, draw_class, geojson

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
    groups = []
    for path in _attention_files(config):
        with h5py.File(path, "r") as file:
            if config.slide in file:
                groups.append(_read_group(file[config.slide], config))  # type: ignore[arg-type]
    if not groups:
        return None
    mean = np.mean([group.attention for group in groups], axis=0)
    seen = [group.probability for group in groups if group.probability is not None]
    return replace(groups[0], attention=mean, probability=np.mean(seen, axis=0) if seen else None)


def _attention_files(config: HeatmapConfig) -> list[Path]:
    run = Path(config.model)
    return [run / "attention.h5"] if (run / "fold.json").is_file() else sorted(run.glob("folds/*/attention.h5"))


def _tested(config: HeatmapConfig) -> list[str]:
    names: list[str] = []
    for path in _attention_files(config):
        with h5py.File(path, "r") as file:
            names += file
    return names


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
    seen = np.asarray(group["probability"], float) if "probability" in group else None
    names = load_facts(Path(config.model)).classes if seen is not None else ()
    attention, coords = np.asarray(group["attention"], float), np.asarray(group["coords"])
    return AttentionMap(config.slide, attention, coords, tile, level0, seen, names)


def computed_map(config: HeatmapConfig) -> AttentionMap:
    """Judge the slide by all folds and return their mean attention. Raises EngineError."""
    folds = load_models(Path(config.model), config.device)
    if config.features is None:
        near = near_names([config.slide], _tested(config))
        raise RunError(
            f"{config.slide} was not tested by {config.model}, so no attention of it is stored.{near} Pass --features "
            "DIR, or the name of a tested slide."
        )
    files = find_features(Path(config.features))
    name = match_names([config.slide], files).get(config.slide)
    if name is None:
        near = near_names([config.slide], files)
        raise RunError(f"{config.features} must hold features of {config.slide}; it does not.{near} Extract the slide.")
    path, facts = files[name], folds[0].facts
    bag, count = folds[0].bag(path)  # read once for all folds
    if not count:
        raise RunError(f"{config.slide} has no tiles, so there is nothing to draw.")
    attention = np.mean([next(fold.classifier.attention_maps([bag])) for fold in folds], axis=0)
    with h5py.File(io.BytesIO(), "w") as memory:
        write_attention(memory, config.slide, path, facts.scales, 0.0, attention)
        if len(facts.classes) > 2:
            seen = np.mean([next(fold.classifier.class_maps([bag])) for fold in folds], axis=0)
            write_classes(memory, config.slide, seen)
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
            folder = yaml.safe_load(settings.read_text(encoding="utf-8"))["features"]
    if folder is None:
        return None
    places = [Path(folder) / "thumbnails", Path(folder).parent / "thumbnails"]
    candidates = [place / f"{config.slide}{ending}" for place in places for ending in (".jpg", ".jpeg", ".png")]
    return next((path for path in candidates if path.is_file()), None)


def write_heatmap(config: HeatmapConfig) -> tuple[list[Path], bool]:
    """Write PNGs and GeoJSON; return where, and whether there was a thumbnail. Raises EngineError."""
    torch.set_num_threads(1)
    name = match_names([config.slide], _tested(config)).get(config.slide, config.slide)
    config = replace(config, slide=name)  # thumbnails are called as features files are
    found = stored_map(config) or computed_map(config)
    thumbnail = thumbnail_of(config, found)
    base = Path(config.out) if config.out is not None else Path(config.model) / "heatmaps" / config.slide
    base.parent.mkdir(parents=True, exist_ok=True)
    pictures = {"": draw(found, thumbnail, config.max_px)}
    for number, name in enumerate(found.classes):
        plain = re.sub(r"[^0-9A-Za-z._-]+", "-", name)
        pictures[f"_{number}-{plain}"] = draw_class(found, number, thumbnail, config.max_px)
    paths = []
    for ending, picture in pictures.items():
        data = io.BytesIO()
        picture.save(data, "png")
        paths.append(base.with_name(f"{base.name}{ending}.png"))
        write_atomically(paths[-1], data.getvalue())
    paths.append(base.with_name(base.name + ".geojson"))
    write_atomically(paths[-1], geojson(found).encode())
    return paths, thumbnail is not None


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, HeatmapConfig, PROG, (__doc__ or "").splitlines()[0], first="model")

    def work() -> int:
        paths, has_thumbnail = write_heatmap(config)
        if not has_thumbnail:
            say("mil.heatmap: no thumbnail beside the features and no --picture; drawn on white.")
        sys.stdout.write("".join(f"{path}\n" for path in paths))
        return DONE

    return exit_code("mil.heatmap", work, lambda: "Run the same command again.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
