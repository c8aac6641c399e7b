"""Tissue as polygons for QuPath, and back: GeoJSON in level-0 px, outlines between the px of the mask.

Invariant: a mask that is written and read again at the same scale is the same mask.
Source: RFC 7946; the properties are those of QuPath 0.5 … 0.8 (objectType, classification).
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.draw import polygon
from skimage.measure import find_contours

from engine.core.errors import EngineError
from engine.core.files import write_atomically
from engine.slides.slide import Slide
from engine.slides.tissue import Overview, TissueConfig, TissueMask, method_of, overview_size

CLASS = "Tissue"
IGNORED = "Ignore*"
"""QuPath's class for what is to be left out; such polygons are cut from the tissue."""
_COLOUR = [0, 200, 0]
_NAMES = uuid.UUID("6f1d2a52-9f0e-4d0e-8b60-1f4f3f2c5a10")


def write_tissue(path: Path, tissue: TissueMask) -> None:
    """Write one annotation per piece of tissue. Raises CanvasError if the disk refuses; the old file then stands."""
    write_atomically(path, json.dumps(tissue_annotations(path.stem, tissue)).encode())


def tissue_annotations(name: str, tissue: TissueMask) -> dict[str, Any]:
    """Return one annotation per piece of tissue of a slide, as a FeatureCollection; equal names give equal ids."""
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMES, f"{name}/{i}")),
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {
                "objectType": "annotation",
                "name": f"{CLASS} {i + 1}",
                "classification": {"name": CLASS, "color": _COLOUR},
            },
        }
        for i, rings in enumerate(_polygons(tissue))
    ]
    return {"type": "FeatureCollection", "features": features}


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

    Raises: EngineError for another file, another class or a geometry without an area, naming it; SlideError
    `too_large`.
    """
    scale, size = slide.field(1, mpp), overview_size(slide, mpp)
    masks = {CLASS: np.zeros(size, np.bool_), IGNORED: np.zeros(size, np.bool_)}
    for number, feature in enumerate(read_features(path), 1):
        where = f"{path}, feature {number}"
        name, rings = polygons_of(feature, where)
        name = name or CLASS
        if name not in masks:
            raise EngineError(f"{where} must be of class {CLASS}, {IGNORED} or none; got {name!r}. Export these alone.")
        for outline, *holes in rings:
            _fill(masks[name], outline, holes, scale)
    return TissueMask(masks[CLASS] & ~masks[IGNORED], scale, (slide.width, slide.height))


def polygons_of(feature: dict[str, Any], where: str) -> tuple[str | None, list[list[NDArray[np.float64]]]]:
    """Return an annotation's class, and its polygons: each an outline and its holes, x, y points (N, 2).

    `where` names the feature in messages. Raises: EngineError for a geometry without an area.
    """
    try:
        name = (feature.get("properties") or {}).get("classification", {}).get("name")
        geometry = feature["geometry"]
        parts = {"Polygon": [geometry["coordinates"]], "MultiPolygon": geometry["coordinates"]}[geometry["type"]]
        rings = [[np.array(ring, np.float64).reshape(-1, 2) for ring in part] for part in parts]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{where} must be a Polygon or MultiPolygon of x, y points; {error!r}. Remove it.") from error
    if not all(np.isfinite(ring).all() for part in rings for ring in part):
        raise EngineError(f"{where} must have finite coordinates (level-0 px). Remove it.")
    return name, rings


def read_features(path: Path) -> list[Any]:
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


def tissue_of(slide: Slide, overview: Overview, finder: TissueConfig, drawn: str | None) -> TissueMask:
    """Return the tissue that was drawn (SLIDE.geojson in the folder `drawn`) where the file holds px, or else found.

    Raises: EngineError for a file that is not there or wrong.
    """
    if drawn is not None:
        tissue = read_tissue(Path(drawn) / f"{slide.name}.geojson", slide, finder.mpp)
        return replace(tissue, mask=tissue.mask & ~overview.empty)
    return TissueMask(method_of(finder)(overview), overview.scale, (slide.width, slide.height), overview.lost)
