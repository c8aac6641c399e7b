"""Which text holds where: boxes in a YAML file, or annotations that were drawn in QuPath, as masks over the cells.

Invariant: the masks of a cell add up to one; a later region lies over earlier ones, and what no region covers takes the
text of the whole. It does not know models or words.

    unit: px                  # or um
    soft: 128                 # width of a region's border, in that unit
    text: dense stroma        # of the whole; or --text
    boxes:
      - {x: 0, y: 0, width: 512, height: 1024, text: mostly fat}

In GeoJSON, px of the canvas, a polygon's class is its text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import ndimage
from skimage.draw import polygon

from engine.core.errors import EngineError
from engine.core.units import TILE_PX
from engine.slides.geojson import polygons_of, read_features

_POINTS = 8
"""Points per cell on each axis at which regions are looked at."""
_DEFAULT_SOFT_PX = 128.0
_KEYS, _BOX_KEYS = {"unit", "soft", "text", "boxes"}, {"x", "y", "width", "height", "text"}


@dataclass(frozen=True)
class TextMap:
    """Texts, and how much each counts in every cell."""

    texts: tuple[str, ...]
    masks: NDArray[np.float32]
    """(texts, H, W)."""


@dataclass(frozen=True)
class _Region:
    text: str
    inside: NDArray[np.float32]
    """(H, W) · _POINTS: 1 inside."""


def whole(text: str, shape: tuple[int, int]) -> TextMap:
    """Return one text for all cells of a grid (H, W)."""
    return TextMap((text,), np.ones((1, *shape), np.float32))


def read_text_map(path: str, base: str | None, size_px: tuple[int, int], mpp: float) -> TextMap:
    """Read the regions of a canvas of (h, w) px at `mpp` µm/px; `base` is the text of what no region covers.

    Raises: EngineError for another file, a region outside the canvas or smaller than a cell, or no text for the rest.
    """
    file = Path(path)
    shape = (-(-size_px[0] // TILE_PX), -(-size_px[1] // TILE_PX))
    if file.suffix.lower() in (".geojson", ".json"):
        regions, soft = _annotations(file, size_px, shape), _DEFAULT_SOFT_PX
    else:
        regions, soft, base = _boxes(file, base, size_px, shape, mpp)
    return _layered(file, regions, base, soft)


def _layered(file: Path, regions: list[_Region], base: str | None, soft_px: float) -> TextMap:
    """Lay regions over each other, each with a soft border, and average over the cells."""
    if not regions:
        raise EngineError(f"{file} must have at least one region; it has none. Use --text alone.")
    rest = np.ones_like(regions[0].inside)
    layers: list[NDArray[np.float32]] = []
    side = max(1, round(soft_px / TILE_PX * _POINTS))
    for region in regions:
        covers: NDArray[np.float32] = ndimage.uniform_filter(region.inside, side, mode="nearest").astype(np.float32)
        layers = [*(layer * (1 - covers) for layer in layers), covers]
        rest *= 1 - covers
    masks = np.stack([rest, *layers])
    h, w = (n // _POINTS for n in rest.shape)
    cells = masks.reshape(len(masks), h, _POINTS, w, _POINTS).mean(axis=(2, 4))
    cells[cells < 1e-3] = 0
    texts = (base or "", *(region.text for region in regions))
    if not base and cells[0].any():
        raise EngineError(
            f"{file} leaves cells without a text; say what the rest shows with --text, or `text:` in the file."
        )
    kept = [i for i in range(len(texts)) if cells[i].any()]
    chosen = cells[kept]
    return TextMap(tuple(texts[i] for i in kept), (chosen / chosen.sum(axis=0)).astype(np.float32))


def _boxes(
    file: Path, base: str | None, size_px: tuple[int, int], shape: tuple[int, int], mpp: float
) -> tuple[list[_Region], float, str | None]:
    content = _read_yaml(file)
    if base is not None and content.get("text") is not None:
        raise EngineError(f"--text and `text:` in {file} exclude each other; got both. Drop one.")
    unit = content.get("unit", "px")
    if unit not in ("px", "um"):
        raise EngineError(f"unit in {file} must be px or um; got {unit!r}.")
    px = 1.0 if unit == "px" else 1 / mpp
    soft = _number(content.get("soft", _DEFAULT_SOFT_PX / px), f"soft in {file}") * px
    found = []
    for number, box in enumerate(content.get("boxes") or [], 1):
        where = f"{file}, box {number}"
        if not isinstance(box, dict) or set(box) != _BOX_KEYS:
            raise EngineError(f"{where} must have {', '.join(sorted(_BOX_KEYS))}; got {box!r}.")
        x, y, width, height = (_number(box[name], f"{name} of {where}") * px for name in ("x", "y", "width", "height"))
        if min(x, y) < 0 or x + width > size_px[1] + 0.5 or y + height > size_px[0] + 0.5:
            raise EngineError(
                f"{where} must lie on the canvas, {size_px[1]} x {size_px[0]} px; it reaches from ({x:g}, {y:g}) to "
                f"({x + width:g}, {y + height:g})."
            )
        corners = np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)])
        found.append(_region(box["text"], [[corners]], shape, where))
    return found, max(soft, 0.0), base if base is not None else content.get("text")


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EngineError(f"{file} must be a YAML file of boxes with texts; {error}.") from error
    if not isinstance(content, dict) or set(content) - _KEYS:
        raise EngineError(f"{file} must have the keys {', '.join(sorted(_KEYS))} alone; got {content!r:.200}.")
    return content


def _annotations(file: Path, size_px: tuple[int, int], shape: tuple[int, int]) -> list[_Region]:
    found = []
    for number, feature in enumerate(read_features(file), 1):
        where = f"{file}, feature {number}"
        name, rings = polygons_of(feature, where)
        points = np.concatenate([part[0] for part in rings])
        if points.min() < -0.5 or (points.max(axis=0) > np.array(size_px[::-1]) + 0.5).any():
            raise EngineError(f"{where} must lie on the canvas, {size_px[1]} x {size_px[0]} px; it leaves it.")
        found.append(_region(name, rings, shape, where))
    return found


def _region(text: Any, rings: list[list[NDArray[np.float64]]], shape: tuple[int, int], where: str) -> _Region:
    if not isinstance(text, str) or not text.strip():
        raise EngineError(f"{where} must have a text (in QuPath: a class); got {text!r}.")
    inside = np.zeros((shape[0] * _POINTS, shape[1] * _POINTS), np.float32)
    for outline, *holes in rings:
        for ring, value in [(outline, 1.0), *((hole, 0.0) for hole in holes)]:
            x, y = (ring * _POINTS / TILE_PX - 0.5).T
            inside[polygon(y, x, inside.shape)] = value
    if inside.sum() < _POINTS**2:
        raise EngineError(
            f"{where} must cover at least one cell of {TILE_PX} x {TILE_PX} px on the canvas; it covers "
            f"{inside.sum() / _POINTS**2:.2g} of one. Enlarge it."
        )
    return _Region(text.strip(), inside)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise EngineError(f"{what} must be a number; got {value!r}.")
    return float(value)
