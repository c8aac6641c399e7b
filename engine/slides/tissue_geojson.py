"""Tissue as polygons for QuPath, and back: GeoJSON in level-0 px, outlines between the px of the mask.

Invariant: a mask that is written and read again at the same scale is the same mask. It does not find tissue.
Source: RFC 7946; the properties are those of QuPath 0.5 … 0.8 (objectType, classification).
"""

import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.draw import polygon
from skimage.measure import find_contours

from engine.errors import EngineError
from engine.slides.slide import Slide
from engine.slides.tissue import TissueMask
from engine.state import write_atomically

CLASS = "Tissue"
IGNORED = "Ignore*"
"""QuPath's class for what is to be left out; such polygons are cut from the tissue."""
_COLOUR = [0, 200, 0]
_NAMES = uuid.UUID("6f1d2a52-9f0e-4d0e-8b60-1f4f3f2c5a10")


def write_tissue(path: Path, tissue: TissueMask) -> None:
    """Write one annotation per piece of tissue. Raises CanvasError if the disk refuses; the old file then stands."""
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMES, f"{path.stem}/{i}")),
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {
                "objectType": "annotation",
                "name": f"{CLASS} {i + 1}",
                "classification": {"name": CLASS, "color": _COLOUR},
            },
        }
        for i, rings in enumerate(_polygons(tissue))
    ]
    write_atomically(path, json.dumps({"type": "FeatureCollection", "features": features}).encode())


def _polygons(tissue: TissueMask) -> Iterator[list[list[list[float]]]]:
    """Yield each connected piece as rings of closed x, y points: the outline first, then its holes."""
    labels, _ = ndimage.label(tissue.mask)  # type: ignore[misc]
    for i, where in enumerate(ndimage.find_objects(labels), 1):
        piece = np.pad(labels[where] == i, 1)
        # Index (r, c) of the padded piece is the centre of px r - 1 + top, c - 1 + left.
        corner = where[0].start - 0.5, where[1].start - 0.5
        rings = [_corners_only(ring) + corner for ring in find_contours(piece.astype(np.float32), 0.5)]
        rings.sort(key=_area, reverse=True)
        yield [np.round(ring[:, ::-1] * tissue.scale, 2).tolist() for ring in rings]


def _corners_only(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """Drop the points of a closed ring on which it does not turn."""
    steps = np.diff(ring, axis=0)
    turns = np.any(steps != np.roll(steps, 1, axis=0), axis=1)
    points = ring[:-1][turns]
    return np.concatenate([points, points[:1]])


def _area(ring: NDArray[np.float64]) -> float:
    y, x = ring.T
    return abs(float(np.dot(y[:-1], x[1:]) - np.dot(x[:-1], y[1:])))


def read_tissue(path: Path, slide: Slide, mpp: float) -> TissueMask:
    """Read annotations as a mask of `mpp` µm/px for a slide: polygons of the class Tissue or of none, less Ignore*.

    Raises: EngineError for another file, another class or a geometry without an area, naming it.
    """
    scale = slide.field(1, mpp)
    width, height = (max(1, math.ceil(n / s - 1e-6)) for n, s in zip((slide.width, slide.height), scale, strict=True))
    masks = {CLASS: np.zeros((height, width), np.bool_), IGNORED: np.zeros((height, width), np.bool_)}
    for number, feature in enumerate(_features(path), 1):
        where = f"{path}, feature {number}"
        try:
            name = (feature.get("properties") or {}).get("classification", {}).get("name", CLASS)
            geometry = feature["geometry"]
            parts = {"Polygon": [geometry["coordinates"]], "MultiPolygon": geometry["coordinates"]}[geometry["type"]]
            rings = [[np.array(ring, np.float64).reshape(-1, 2) for ring in part] for part in parts]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{where} must be a Polygon or MultiPolygon of x, y points; {error!r}. Remove it."
            ) from error
        if name not in masks:
            raise EngineError(f"{where} must be of class {CLASS}, {IGNORED} or none; got {name!r}. Export these alone.")
        if not all(np.isfinite(ring).all() for part in rings for ring in part):
            raise EngineError(f"{where} must have finite coordinates (level-0 px). Remove it.")
        for outline, *holes in rings:
            _fill(masks[name], outline, holes, scale)
    return TissueMask(masks[CLASS] & ~masks[IGNORED], scale, (slide.width, slide.height))


def _features(path: Path) -> list[Any]:
    """Return the features of a collection, of a bare list, or of one feature, as QuPath writes them."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} must be a readable GeoJSON file; {error}.") from error
    features = content.get("features", [content]) if isinstance(content, dict) else content
    if not isinstance(features, list) or not all(isinstance(f, dict) for f in features):
        raise EngineError(f"{path} must be a GeoJSON FeatureCollection, as QuPath exports it.")
    return features


def _fill(
    mask: NDArray[np.bool_], outline: NDArray[np.float64], holes: list[NDArray[np.float64]], scale: tuple[float, float]
) -> None:
    """Set the px whose centres lie inside the outline and outside its holes."""
    inside = np.zeros_like(mask)
    for ring, value in [(outline, True), *((hole, False) for hole in holes)]:
        x, y = (ring / scale - 0.5).T
        inside[polygon(y, x, mask.shape)] = value
    mask |= inside
