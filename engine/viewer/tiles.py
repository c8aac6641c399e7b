"""Pictures cut into JPEG tiles for the browser: runs, slides, small pictures, Deep Zoom. Reads, never writes.

Level `depth` halves the one below it, as in Deep Zoom: depth `deepest` is the picture itself. Memory is bounded
whatever the picture: a tile of a slide without reduced levels is put together from pieces, and few tiles are made at a
time (`Makers`). Px that cannot be read are grey, and counted. It does not know requests or what a run is.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import simplejpeg
from numpy.typing import NDArray

from engine.core.errors import CanvasError, EngineError, SlideError
from engine.images.ome_zarr import CHUNK_PX, Image
from engine.slides.boundary import one_slide
from engine.slides.slide import Slide
from engine.viewer.places import Item

TILE_PX = CHUNK_PX
"""A chunk of our pictures is one tile: nothing is decoded twice."""
PIECE_PX = 2048
"""Side of what is read of a slide at once, px of its level: 12 MB."""
QUALITY = 90
GREY = 128
MOST_DAMAGED = 10_000
"""Tiles that are told apart when damage is counted."""
LARGEST_FLAT_PX = 2**26
"""px of a picture without levels that is held in memory: 200 MB."""
DZI_BYTES = 65536
"""A Deep Zoom descriptor has five lines."""


class GoneError(EngineError):
    """What is viewed was removed meanwhile."""


@dataclass(frozen=True)
class Tile:
    """One answer."""

    data: bytes
    """JPEG, or PNG for Deep Zoom pictures that hold it."""
    damaged: bool = False


@dataclass(frozen=True)
class Place:
    """Where a tile lies, px of its level, which is reduced by `factor`."""

    level: int
    y: int
    x: int
    height: int
    width: int

    @property
    def factor(self) -> int:
        return 2**self.level


class Pyramid(Protocol):
    """A picture in tiles. Sizes are px of the deepest level."""

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        ...

    @property
    def depths(self) -> tuple[int, int]:
        """The coarsest and the deepest level that are there."""
        ...

    @property
    def tiling(self) -> tuple[int, int]:
        """Side and overlap of tiles, px."""
        ...

    def tile(self, depth: int, column: int, row: int) -> Tile:
        """Return a tile. Raises: LookupError for one that is not there; GoneError; EngineError."""
        ...


def deepest_of(height: int, width: int) -> int:
    """Return the number of the level that is the picture itself, one px being level 0."""
    return (max(height, width) - 1).bit_length()


def span(size: int, factor: int, number: int) -> tuple[int, int]:
    """Return the first px and the count of px of a tile along an axis reduced by `factor`. Raises: LookupError."""
    reduced = -(-size // factor)
    first = number * TILE_PX
    if not 0 <= first < reduced:
        raise LookupError(number)
    return first, min(TILE_PX, reduced - first)


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """Return the depths of a picture that is halved until it is one tile: the coarsest and the deepest."""
    deepest = deepest_of(*size)
    return max(0, deepest - max(0, math.ceil(math.log2(max(size) / TILE_PX)))), deepest


def place_of(pyramid: "Pyramid", depth: int, column: int, row: int) -> "Place":
    """Return where a tile lies in its level. Raises: LookupError for one that is not there."""
    first, deepest = pyramid.depths
    if not first <= depth <= deepest:
        raise LookupError(depth)
    level = deepest - depth
    (y, h), (x, w) = (span(side, 2**level, n) for side, n in zip(pyramid.size, (row, column), strict=True))
    return Place(level, y, x, h, w)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Return uint8 (h, w, 3) as JPEG, colours at full resolution: nuclei are told apart by them."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "444")


def grey(height: int, width: int) -> Tile:
    """Return a tile that cannot be read."""
    return Tile(encode(np.full((height, width, 3), GREY, np.uint8)), damaged=True)


@dataclass(frozen=True)
class OurPyramid:
    """A picture that this engine wrote, level by level."""

    image: Image

    @property
    def size(self) -> tuple[int, int]:
        return self.image.sizes[0]

    @property
    def depths(self) -> tuple[int, int]:
        deepest = deepest_of(*self.size)
        return deepest - len(self.image.sizes) + 1, deepest

    tiling = (TILE_PX, 0)

    def tile(self, depth: int, column: int, row: int) -> Tile:
        p = place_of(self, depth, column, row)
        try:
            rows = self.image.read(p.y, p.y + p.height, p.x, p.x + p.width, p.level)
            return Tile(encode(rows.transpose(1, 2, 0)))
        except CanvasError as error:
            if not (self.image.path / "zarr.json").is_file():
                raise GoneError(f"{self.image.path} is gone; it was removed while it was viewed.") from error
            return grey(p.height, p.width)


@dataclass(frozen=True)
class SlidePyramid:
    """A slide at square px of its mean µm/px; every level is read from the coarsest one that is fine enough."""

    slide: Slide

    @property
    def stretch(self) -> tuple[float, float]:
        """Px of the pyramid per level-0 px (y, x): 1 unless the slide's px are no squares."""
        r = self.slide.resolution
        return r.mpp_y / r.mpp, r.mpp_x / r.mpp

    @property
    def size(self) -> tuple[int, int]:
        down, across = self.stretch
        return math.ceil(self.slide.height * down - 1e-6), math.ceil(self.slide.width * across - 1e-6)

    @property
    def depths(self) -> tuple[int, int]:
        return halved(self.size)

    tiling = (TILE_PX, 0)

    def tile(self, depth: int, column: int, row: int) -> Tile:
        place = place_of(self, depth, column, row)
        try:
            with one_slide(self.slide.name, self.slide.path, "read"):  # damage makes libraries raise anything
                pixels, damaged = self._pixels(place)
        except SlideError as error:
            if error.code == "vanished" or not self.slide.path.exists():
                raise GoneError(f"{self.slide.path} is gone; it was removed while it was viewed.") from error
            return grey(place.height, place.width)
        return Tile(encode(pixels), damaged)

    def _pixels(self, place: Place) -> tuple[NDArray[np.uint8], bool]:
        """Read a tile, uint8 (h, w, 3), in pieces that are small in the file; say whether px of it are damaged."""
        factor, h, w = place.factor, place.height, place.width
        mpp = self.slide.resolution.mpp * factor
        level = self.slide.level_for(mpp)
        per_px = factor / max(min(self.slide.scales[level]), 1)
        piece = max(1, min(TILE_PX, int(PIECE_PX / per_px)))
        down, across = self.stretch
        pixels, damaged = np.empty((h, w, 3), np.uint8), False
        for top in range(0, h, piece):
            for left in range(0, w, piece):
                n, m = min(piece, h - top), min(piece, w - left)
                at = (place.x + left) * factor / across, (place.y + top) * factor / down
                region = self.slide.read(*at, m, n, mpp, level)
                pixels[top : top + n, left : left + m] = region.pixels
                damaged |= region.damaged > 0
        return pixels, damaged


@dataclass(frozen=True)
class FlatPyramid:
    """A small picture in memory, uint8 (h, w, 3)."""

    pixels: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def depths(self) -> tuple[int, int]:
        return halved(self.size)

    tiling = (TILE_PX, 0)

    def tile(self, depth: int, column: int, row: int) -> Tile:
        p = place_of(self, depth, column, row)
        part = self.pixels[p.y * p.factor :, p.x * p.factor :][: p.height * p.factor, : p.width * p.factor]
        if p.factor > 1:
            part = np.asarray(PIL.Image.fromarray(np.ascontiguousarray(part)).reduce(p.factor))
        return Tile(encode(part))


def flat_picture(path: Path) -> NDArray[np.uint8]:
    """Read a small picture as uint8 (h, w, 3). Raises: EngineError for a damaged or a large one."""
    try:
        with PIL.Image.open(path) as file:
            if file.width * file.height > LARGEST_FLAT_PX:
                raise EngineError(f"{path} must have at most {LARGEST_FLAT_PX} px to be shown; it is larger.")
            return np.asarray(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise EngineError(f"{path} must be a whole picture; {error}.") from error


@dataclass(frozen=True)
class DeepZoom:
    """A Deep Zoom picture as it lies on the disk; its tiles are passed on."""

    item: Item
    size: tuple[int, int]
    tiling: tuple[int, int]
    ending: str

    @classmethod
    def open(cls, item: Item) -> "DeepZoom":
        """Read name.dzi. Raises: EngineError unless it is one of JPEG or PNG tiles."""
        try:
            with item.inside(item.path).open("rb") as file:
                root = ElementTree.fromstring(file.read(DZI_BYTES))
            sizes = next(node for node in root if node.tag.endswith("Size"))
            size = int(sizes.attrib["Height"]), int(sizes.attrib["Width"])
            tiling, ending = (int(root.attrib["TileSize"]), int(root.attrib["Overlap"])), root.attrib["Format"].lower()
        except (OSError, ValueError, KeyError, StopIteration, ElementTree.ParseError) as error:
            raise EngineError(f"{item.path} must be a Deep Zoom descriptor; it cannot be read ({error}).") from error
        if min(*size, tiling[0]) < 1 or tiling[1] < 0 or ending not in ("jpeg", "jpg", "png"):
            raise EngineError(f"{item.path} must have a size, and tiles of JPEG or PNG; got {size}, {ending!r}.")
        return cls(item, size, tiling, ending)

    @property
    def depths(self) -> tuple[int, int]:
        return 0, deepest_of(*self.size)

    def tile(self, depth: int, column: int, row: int) -> Tile:
        deepest, side = self.depths[1], self.tiling[0]
        reduced = [-(-length // 2 ** max(deepest - depth, 0)) for length in self.size]
        if not 0 <= depth <= deepest or not (0 <= row * side < reduced[0] and 0 <= column * side < reduced[1]):
            raise LookupError(depth)
        folder = self.item.path.with_name(self.item.path.stem + "_files")
        path = folder / str(depth) / f"{column}_{row}.{self.ending}"
        try:
            data = self.item.inside(path).read_bytes()
        except OSError as error:
            if not self.item.path.is_file():
                raise GoneError(f"{self.item.path} is gone; it was removed while it was viewed.") from error
            data = b""
        if not data.startswith((b"\xff\xd8", b"\x89PNG")):
            return grey(min(side, reduced[0] - row * side), min(side, reduced[1] - column * side))
        return Tile(data)


@dataclass
class Makers:
    """Few tiles are made at a time, whoever asks, and damaged ones are counted."""

    at_once: int = 4
    damaged: dict[str, set[tuple[str, int, int, int]]] = field(default_factory=dict)
    """Item → the tiles of it that could not be read."""

    def __post_init__(self) -> None:
        self._turn, self._counting = threading.BoundedSemaphore(self.at_once), threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn."""
        with self._turn:
            yield

    def make(self, item: str, layer: str, pyramid: Pyramid, place: tuple[int, int, int]) -> Tile:
        """Return a tile (depth, column, row) when it is its turn. Raises: as `Pyramid.tile`."""
        with self.turn():
            tile = pyramid.tile(*place)
        if tile.damaged:
            with self._counting:
                known = self.damaged.setdefault(item, set())
                if len(known) < MOST_DAMAGED:
                    known.add((layer, *place))
        return tile

    def count(self, item: str) -> int:
        """Return how many damaged tiles of an item were asked for."""
        return len(self.damaged.get(item, ()))
