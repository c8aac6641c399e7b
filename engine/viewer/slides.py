"""A slide as the viewer shows it: its tiles, tissue, grid, features and attention, each when it is asked for.

Features come from an extraction, attention from a study of mil.train; both are read from their files, by the slide's
name. Reads, never writes. It does not know requests.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import PIL.Image
import tifffile
from scipy.stats import rankdata

from engine.core.errors import EngineError, SlideError
from engine.core.lazy import file_stamp, opened
from engine.features.bag_reader import BagFile
from engine.slides.geojson import tissue_annotations
from engine.slides.slide import Slide, open_slide, slide_name
from engine.slides.tile_grid import PARENT_FACTOR, GridConfig, plan_grid
from engine.slides.tissue import TissueConfig, TissueMask, find_tissue
from engine.viewer.places import Item
from engine.viewer.shapes import LARGEST_BYTES, read_shapes, squares, too_large
from engine.viewer.tiles import SlidePyramid

TOP_TILES = 24
"""Tiles with the most attention that are listed."""
NO_SCALE = ("no_mpp", "absurd_mpp")
REPORT_BYTES = 64 * 2**20


@dataclass(eq=False)
class SlideView:
    """One slide, and where to look for what belongs to it."""

    item: Item
    mpp: float | None = None
    """µm/px for a file that states none."""
    features: Path | None = None
    """Output folder of an extraction."""
    mil: Path | None = None
    """Run folder of a study."""
    _masks: dict[tuple[str, int, int], TissueMask] = field(default_factory=dict)
    _looking: threading.Lock = field(default_factory=threading.Lock)

    def opened(self) -> tuple[Slide, bool]:
        """Return the slide, and whether its µm/px is known; 1 stands for one that is not. Raises: SlideError."""
        path = self.item.path
        if not path.exists():
            raise SlideError("vanished", f"{path} is gone; it was removed while it was viewed.")
        return opened(("view", file_stamp(path), self.mpp), partial(self._open, path))

    def _open(self, path: Path) -> tuple[Slide, bool]:
        self.item.inside(path)
        if path.is_dir():
            self.item.hold(path)
        try:
            return open_slide(path, mpp=self.mpp), True
        except SlideError as error:
            if error.code not in NO_SCALE:
                raise
            return open_slide(path, {path.name: (1.0, 1.0)}), False

    def pyramid(self) -> SlidePyramid:
        return SlidePyramid(self.opened()[0])

    def facts(self) -> dict[str, Any]:
        """Return what is known of it, for the page. Raises: SlideError."""
        slide, known = self.opened()
        said: dict[str, Any] = {
            "level 0": f"{slide.width} x {slide.height} px",
            "µm/px": f"{slide.resolution.mpp:.4g} ({slide.resolution.source})" if known else "not stated by the file",
            "objective": "not stated" if slide.objective is None else f"{slide.objective:g}x",
            "reader": slide.reader,
        }
        bag = self._bag()
        if bag is not None:
            with bag:
                a = bag.attributes
                said["features"] = f"{a.encoder}, " + ", ".join(f"{bag.shape(s)[0]} tiles at {s}" for s in bag.scales)
                masked = sum(int((~bag.valid(s)).sum()) for s in bag.scales)
                said["masked tiles"] = masked
        return said

    @property
    def synthetic(self) -> bool:
        """Whether the file, or its features, say that it is generated."""
        bag = self._bag()
        if bag is not None:
            with bag:
                if bag.attributes.synthetic:
                    return True
        return says_synthetic(self.item.path)

    def overlays(self) -> list[str]:
        """Return what can be laid over it."""
        known = self.opened()[1]
        names = ["tissue", "grid"] if known else []
        names += ["attention"] if self._attention_files() else []
        return [*names, "annotations"] if self._annotations() is not None else names

    def overlay(self, name: str) -> dict[str, Any]:
        """Return an overlay's numbers for drawing, in level-0 px. Raises: LookupError; EngineError."""
        if name == "tissue":
            features = tissue_annotations(self.item.name, self._tissue())["features"]
            return {"shapes": [{"rings": f["geometry"]["coordinates"], "closed": True} for f in features]}
        if name == "grid":
            return {"scales": self._grid()}
        if name == "attention":
            return self._attention()
        path = self._annotations()
        if name != "annotations" or path is None:
            raise LookupError(name)
        real = self.item.inside(path)
        if (size := real.stat().st_size) > LARGEST_BYTES:
            raise too_large(size)
        return read_shapes(real.read_bytes())

    def geojson(self, name: str) -> dict[str, Any]:
        """Return an overlay as QuPath imports it. Raises: LookupError; EngineError."""
        if name == "tissue":
            return tissue_annotations(self.item.name, self._tissue())
        if name == "attention":
            found = self._attention()
            measured = {"attention": found["values"], "rank": found["ranks"]}
            return squares(f"{self.item.name}/attention", found["at"], found["tile"], measured)
        scales = {scale["name"]: scale for scale in self._grid()}
        if name not in scales:
            raise LookupError(name)
        return squares(f"{self.item.name}/{name}", scales[name]["at"], scales[name]["tile"], {})

    def report(self) -> bytes | None:
        """Return the report of the extraction, if there is one."""
        if self.features is None or self._bag() is None:
            return None
        path = _within(self.features, "report.html")
        return path.read_bytes() if path is not None and path.stat().st_size <= REPORT_BYTES else None

    def _tissue(self) -> TissueMask:
        slide, known = self.opened()
        if not known:
            raise EngineError("tissue is found at 8 µm/px, and this file states no µm/px. Pass --mpp.")
        stamp = file_stamp(self.item.path)
        with self._looking:  # seconds on a large slide: once, whoever asks
            if stamp not in self._masks:
                self._masks = {stamp: find_tissue(slide, TissueConfig())}
            return self._masks[stamp]

    def _grid(self) -> list[dict[str, Any]]:
        """Return name, tile size and corners per scale: those of the features, or those that would be made."""
        bag = self._bag()
        if bag is not None:
            with bag:
                found = [bag.scale_of(name) for name in bag.scales]
            return [{"name": s.name, "tile": s.tile_level0_px, "at": s.coords.tolist()} for s in found]
        grid = plan_grid(self.opened()[0], self._tissue(), GridConfig())
        wide = tuple(side * PARENT_FACTOR for side in grid.field)
        return [
            {"name": "20x", "tile": grid.field, "at": grid.coords.tolist()},
            {"name": "5x", "tile": wide, "at": grid.parent_coords.tolist()},
        ]

    def _bag(self) -> BagFile | None:
        if self.features is None:
            return None
        path = _within(self.features, f"features/{self.item_slide}.h5")
        return None if path is None else BagFile(path)

    @property
    def item_slide(self) -> str:
        """The slide's name in tables: its file name without endings."""
        return slide_name(self.item.path)

    def _annotations(self) -> Path | None:
        """Return SLIDE.geojson beside the slide, where QuPath users put it, or the extraction's tissue."""
        beside = self.item.path.with_name(f"{self.item_slide}.geojson")
        return beside if beside.is_file() else None

    def _attention_files(self) -> list[Path]:
        """Return the files of a study that hold attention of this slide."""
        if self.mil is None:
            return []
        found = []
        names = [p.relative_to(self.mil).as_posix() for p in sorted(self.mil.glob("folds/*/attention.h5"))]
        for name in [*names, "attention.h5"]:
            path = _within(self.mil, name)
            if path is not None and _holds(path, self.item_slide):
                found.append(path)
        return found

    def _attention(self) -> dict[str, Any]:
        """Return attention, mean over the folds that tested the slide, its ranks 0 … 1 and the tiles with the most."""
        groups = [_attention_of(path, self.item_slide) for path in self._attention_files()]
        if not groups:
            raise LookupError("attention")
        corners, tile = groups[0][1:]
        if any(len(values) != len(corners) for values, _, _ in groups):
            raise EngineError(
                f"attention of {self.item_slide} must have one value per tile in every fold; train again."
            )
        mean = np.mean([values for values, _, _ in groups], axis=0)
        ranks = (rankdata(mean) - 1) / max(len(mean) - 1, 1)
        top = np.argsort(-mean, kind="stable")[:TOP_TILES]
        return {
            "at": corners.tolist(), "tile": tile, "values": mean.tolist(), "ranks": np.round(ranks, 4).tolist(),
            "top": top.tolist(), "folds": len(groups),
        }  # fmt: skip


def _within(folder: Path, name: str) -> Path | None:
    """Return a file of a folder that was given, unless it is not there or a link leads out."""
    path = folder / name
    real = path.resolve()
    return real if real.is_file() and real.is_relative_to(folder.resolve()) else None


def _holds(path: Path, slide: str) -> bool:
    try:
        with h5py.File(path, "r") as file:
            return slide in file
    except OSError:  # a fold at work
        return False


def _attention_of(path: Path, slide: str) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Return attention (N,), corners (N, 2) and tile (w, h) in level-0 px. Raises: EngineError if it lacks them."""
    try:
        with h5py.File(path, "r") as file:
            group: Mapping[str, Any] = file[slide]  # type: ignore[assignment]
            side = group.attrs["tile_level0_px"]  # type: ignore[attr-defined]
            return np.asarray(group["attention"], float), np.asarray(group["coords"]), (float(side[0]), float(side[1]))
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise EngineError(
            f"{path} must hold attention, coords and tile_level0_px of {slide}; {error}. Train on features that keep "
            "coordinates."
        ) from error


def says_synthetic(path: Path) -> bool:
    """Say whether a picture's own metadata call it synthetic: ours and the phantoms' do."""
    try:
        if path.is_dir():
            return '"synthetic": true' in (path / "zarr.json").read_text(encoding="utf-8")
        with path.open("rb") as file:
            head = file.read(8)
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            with tifffile.TiffFile(path) as tiff:
                return "synthetic" in (tiff.pages[0].description or "")  # type: ignore[union-attr]
        if head[:3] == b"\xff\xd8\xff" or head.startswith(b"\x89PNG"):
            with PIL.Image.open(path) as picture:
                said = [str(v) for v in picture.info.values() if isinstance(v, str)]
                return any("synthetic" in text for text in [*said, *map(str, picture.getexif().values())])
    except (OSError, ValueError, IndexError, SyntaxError, PIL.Image.DecompressionBombError):
        return False
    return False
