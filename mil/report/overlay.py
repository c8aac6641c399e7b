"""Attention drawn: a PNG over the slide's thumbnail, and GeoJSON for QuPath.

Colours show ranks within the slide, 0 (least) to 1 (most attended): attention itself is so skewed that a few tiles
would be all there is to see. GeoJSON carries the attention as well. It does not know models or runs.
Frames: coordinates are x, y of a tile's top left corner in level-0 px. Source of the GeoJSON form: QuPath 0.5's export.
"""

import json
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.stats import rankdata

from mil.errors import RunError

COLOURS = "viridis"
OPACITY = 0.6
BINS = 5
"""Classes of tiles in QuPath, by rank."""
_BAR_PX = 28


@dataclass(frozen=True)
class AttentionMap:
    """The attention of one slide and where its tiles lie."""

    slide: str
    attention: NDArray[np.float64]
    """(N,): sums to one."""
    coords: NDArray[np.int64]
    """(N, 2)"""
    tile: tuple[float, float]
    """Width and height of a tile, level-0 px."""
    size: tuple[int, int] | None
    """Width and height of the slide, level-0 px; None when the features do not say."""
    probability: NDArray[np.float64] | None = None
    """(N, classes): of more than two classes, what the model sees in each tile by itself."""
    classes: tuple[str, ...] = ()
    """Their names; none without `probability`."""

    def __post_init__(self) -> None:
        if self.coords.shape != (len(self.attention), 2):
            raise RunError(
                f"{self.slide} must have one coordinate per attention; got {len(self.coords)} for "
                f"{len(self.attention)}. The features changed since training: train or extract again."
            )

    @property
    def extent(self) -> tuple[float, float]:
        """Return width and height of what is drawn, level-0 px."""
        if self.size is not None:
            return float(self.size[0]), float(self.size[1])
        width, height = (self.coords.max(axis=0) + self.tile).tolist()
        return width, height

    @property
    def ranks(self) -> NDArray[np.float64]:
        """Return 0 … 1 per tile; ties share a rank."""
        if len(self.attention) == 1:
            return np.ones(1)
        return (rankdata(self.attention) - 1) / (len(self.attention) - 1)


def draw(found: AttentionMap, thumbnail: Image.Image | None, longest_px: int = 2048) -> Image.Image:
    """Return the map over the thumbnail (white, if None), at most `longest_px` long, with a scale below it."""
    words = "least", f"most ({len(found.attention):,} tiles)"
    return _with_scale(_painted(found, found.ranks, thumbnail, longest_px), *words)


def draw_class(found: AttentionMap, number: int, thumbnail: Image.Image | None, longest_px: int = 2048) -> Image.Image:
    """Return one class's probability in each tile by itself, 0 to 1, drawn as `draw` does."""
    assert found.probability is not None
    painted = _painted(found, found.probability[:, number], thumbnail, longest_px)
    return _with_scale(painted, "0", f"1 ({found.classes[number]})")


def _painted(
    found: AttentionMap, values: NDArray[np.float64], thumbnail: Image.Image | None, longest_px: int
) -> Image.Image:
    """Paint values 0 … 1, one per tile, over the thumbnail."""
    width, height = found.extent
    scale = longest_px / max(width, height)
    if thumbnail is not None:
        scale = min(scale, thumbnail.width / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if thumbnail is None:
        picture = np.full((size[1], size[0], 3), 255, np.float32)
    else:
        picture = np.asarray(thumbnail.convert("RGB").resize(size, Image.Resampling.BOX), np.float32)
    colours = mpl.colormaps[COLOURS](values)[:, :3].astype(np.float32) * 255
    total, cover = np.zeros_like(picture), np.zeros(picture.shape[:2], np.float32)
    start = np.floor(found.coords * scale).astype(int)
    stop = np.maximum(start + 1, np.ceil((found.coords + found.tile) * scale - 1e-9).astype(int))
    for (x0, y0), (x1, y1), colour in zip(start.tolist(), stop.tolist(), colours, strict=True):
        total[y0:y1, x0:x1] += colour
        cover[y0:y1, x0:x1] += 1
    painted = cover > 0
    mixed = total[painted] / cover[painted][:, None]
    picture[painted] = (1 - OPACITY) * picture[painted] + OPACITY * mixed
    return Image.fromarray(picture.round().astype(np.uint8))


def _with_scale(picture: Image.Image, least: str, most: str) -> Image.Image:
    """Put a colour bar below the picture."""
    out = Image.new("RGB", (max(picture.width, 240), picture.height + _BAR_PX), "white")
    out.paste(picture, (0, 0))
    ramp = mpl.colormaps[COLOURS](np.linspace(0, 1, 100))[None, :, :3] * 255
    bar = Image.fromarray(np.repeat(ramp.round().astype(np.uint8), 12, axis=0))
    out.paste(bar, (44, picture.height + 8))
    pen = ImageDraw.Draw(out)
    pen.text((8, picture.height + 8), least, fill="black")
    pen.text((150, picture.height + 8), most, fill="black")
    return out


def geojson(found: AttentionMap) -> str:
    """Return one square per tile as QuPath imports it: class by rank, measurements attention and rank."""
    ranks = found.ranks
    classes = np.minimum((ranks * BINS).astype(int), BINS - 1)
    middle = (np.arange(BINS) + 0.5) / BINS
    rgb = (mpl.colormaps[COLOURS](middle)[:, :3] * 255).round().astype(int).tolist()
    kinds = [
        f'{{"name":"Attention {at + 1} of {BINS}","color":[{red},{green},{blue}]}}'
        for at, (red, green, blue) in enumerate(rgb)
    ]
    width, height = found.tile
    lines = []
    seen = (
        ["" for _ in ranks] if found.probability is None else [_measured(found.classes, p) for p in found.probability]
    )
    tiles = zip(found.coords.tolist(), found.attention, ranks, classes, seen, strict=True)
    for (x, y), value, rank, kind, more in tiles:
        right, bottom = x + width, y + height
        ring = f"[[{x},{y}],[{right:.10g},{y}],[{right:.10g},{bottom:.10g}],[{x},{bottom:.10g}],[{x},{y}]]"
        lines.append(
            f'{{"type":"Feature","geometry":{{"type":"Polygon","coordinates":[{ring}]}},"properties":{{'
            f'"objectType":"tile","classification":{kinds[kind]},'
            f'"measurements":{{"attention":{value:.6g},"rank":{rank:.4f}{more}}}}}}}'
        )
    return '{"type":"FeatureCollection","features":[\n' + ",\n".join(lines) + "\n]}\n"


def _measured(classes: tuple[str, ...], probability: NDArray[np.float64]) -> str:
    """Return a tile's probabilities as further measurements."""
    pairs = zip(classes, probability, strict=True)
    return "".join(f",{json.dumps('probability ' + name)}:{value:.4f}" for name, value in pairs)
