"""Shapes over a picture as QuPath reads and writes them: GeoJSON in level-0 px, in both directions.

What comes in is data of strangers: it is bounded, checked and reduced to numbers and short texts, which the page shows
as text. It does not know files or slides. Source: RFC 7946; properties as QuPath 0.5 … 0.8 writes them.
"""

import json
import math
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from engine.core.errors import EngineError

LARGEST_BYTES = 32 * 2**20
"""Of a GeoJSON file that is shown: about a hundred thousand cells."""
MOST_POINTS = 2_000_000
LONGEST_TEXT = 200
_NAMES = uuid.UUID("0f6f2b0e-6f3f-4d7e-9a54-1b0a6c3c9d51")
_DEPTH = {"Point": 0, "MultiPoint": 1, "LineString": 1, "MultiLineString": 2, "Polygon": 2, "MultiPolygon": 3}
"""Geometry → how deep its points lie."""
Point = tuple[float, float]


def too_large(size: int) -> EngineError:
    """Return the error for a file that is larger than is shown."""
    return EngineError(
        f"a GeoJSON file must have at most {LARGEST_BYTES / 2**20:.0f} MiB to be shown; this one has "
        f"{size / 2**20:,.0f} MiB. Export fewer objects, such as annotations without cells."
    )


def read_shapes(data: bytes) -> dict[str, Any]:
    """Return shapes {name, kind, colour, closed, rings, measurements}, and how many geometries were left out.

    `rings` are lists of x, y in level-0 px; a point is a ring of one. Raises: EngineError for anything that is no
    GeoJSON, or is too large.
    """
    if len(data) > LARGEST_BYTES:
        raise too_large(len(data))
    try:
        content = json.loads(data)
        features = content.get("features", [content]) if isinstance(content, dict) else content
        if not isinstance(features, list):
            raise ValueError("it holds no features")
        shapes, skipped, points = [], 0, 0
        for feature in features:
            shape = _shape(feature)
            skipped += shape is None
            if shape is not None:
                points += sum(len(ring) for ring in shape["rings"])
                shapes.append(shape)
            if points > MOST_POINTS:
                raise ValueError(f"it has more than {MOST_POINTS} points")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"the file must be GeoJSON as QuPath exports it (a FeatureCollection, a list or one Feature); {error}."
        ) from error
    return {"shapes": shapes, "skipped": skipped}


def _shape(feature: Any) -> dict[str, Any] | None:
    """Return one feature; None for a geometry that cannot be drawn."""
    geometry, properties = feature["geometry"], feature.get("properties") or {}
    if not isinstance(geometry, dict) or geometry.get("type") not in _DEPTH:
        return None
    depth = _DEPTH[geometry["type"]]
    rings = [[_point(p) for p in ring] for ring in _flattened(geometry["coordinates"], depth)]
    kind = properties.get("classification") or {}
    measured = properties.get("measurements") or {}
    if isinstance(measured, list):  # QuPath before 0.4
        measured = {str(m["name"]): m["value"] for m in measured}
    numbers = {_text(k): float(v) for k, v in list(measured.items())[:20] if _is_number(v)}
    return {
        "name": _text(properties.get("name") or ""),
        "kind": _text(kind.get("name") or "" if isinstance(kind, dict) else kind),
        "colour": _colour(kind.get("color", kind.get("colorRGB")) if isinstance(kind, dict) else None),
        "closed": depth >= 2 and geometry["type"] != "MultiLineString",
        "rings": rings,
        "measurements": numbers,
    }


def _flattened(coordinates: Any, depth: int) -> list[Any]:
    """Return lists of points from coordinates of any of the geometries."""
    if depth == 0:
        return [[coordinates]]
    if depth == 1:
        return [coordinates]
    return [ring for part in coordinates for ring in _flattened(part, depth - 1)]


def _point(value: Any) -> Point:
    x, y = float(value[0]), float(value[1])
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError("coordinates must be finite")
    return x, y


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(value: object) -> str:
    return str(value)[:LONGEST_TEXT]


def _colour(value: object) -> list[int] | None:
    """Return 0..255 of red, green and blue from [r, g, b] or QuPath's packed number."""
    if isinstance(value, int):
        return [value >> 16 & 255, value >> 8 & 255, value & 255]
    if isinstance(value, list) and len(value) >= 3 and all(isinstance(v, int) for v in value):
        return [min(max(v, 0), 255) for v in value[:3]]
    return None


def squares(
    name: str, corners: Iterable[Sequence[float]], tile: tuple[float, float], measured: dict[str, Sequence[float]]
) -> dict[str, Any]:
    """Return one tile per corner (x, y) as a FeatureCollection of QuPath tile objects, with its measurements."""
    features = []
    for number, (x, y) in enumerate(corners):
        right, bottom = round(x + tile[0], 2), round(y + tile[1], 2)
        ring = [[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]
        features.append({
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMES, f"{name}/{number}")),
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "tile", "measurements": {k: float(v[number]) for k, v in measured.items()}},
        })  # fmt: skip
    return {"type": "FeatureCollection", "features": features}
