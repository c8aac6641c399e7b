"""Decide how many µm a level-0 px of a slide measures, and say where the value comes from.

Invariant: a value is taken from a named source or the slide is refused; nothing is rounded to a magnification and
nothing is guessed in silence. It opens no slide: backends hand in what the file claims.

Order: overrides table > the vendor's own property > OME-XML or OME-NGFF > ImageJ's unit > pixel scale of a projected
GeoTIFF > TIFF resolution > the value given for slides that state none (`mpp`) > objective power, marked as estimated >
refusal. A claim outside 0.05 … 10 µm/px (GeoTIFF: 1 mm … 10 km) is passed over and named: 72 and 96 dpi, written by
programs that know no scale, would be 353 and 265 µm/px.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from engine.core.errors import EngineError, SlideError
from engine.slides.units import ground_unit, microns, microns_per, number, per_px, tiff_unit

FINEST_MPP, COARSEST_MPP = 0.05, 10.0
"""µm/px of any scanner, with room on both sides."""
FINEST_GROUND, COARSEST_GROUND = 1e3, 1e10
"""µm/px of any picture from above: 1 mm (drones) … 10 km (weather satellites)."""
ESTIMATE_AT_1X = 10.0
"""µm/px at objective power 1: 40x is about 0.25, 20x about 0.5."""


@dataclass(frozen=True)
class Claim:
    """What one part of a file says about µm/px at level 0."""

    source: str
    mpp_x: float
    mpp_y: float
    limits: tuple[float, float] = (FINEST_MPP, COARSEST_MPP)

    @property
    def credible(self) -> bool:
        """Whether both axes lie where such files are, and agree within a factor of two."""
        in_range = all(self.limits[0] <= mpp <= self.limits[1] for mpp in (self.mpp_x, self.mpp_y))
        return in_range and 0.5 <= self.mpp_x / self.mpp_y <= 2


@dataclass(frozen=True)
class Claims:
    """All that a file says about its scale; `mpp` in order of trust."""

    mpp: tuple[Claim, ...] = ()
    objective: float | None = None
    """Power of the objective; may be fractional."""
    passed: tuple[str, ...] = ()
    """What the file says besides, and why that is no claim."""


@dataclass(frozen=True)
class Resolution:
    """µm per level-0 px on both axes, and where the values come from."""

    mpp_x: float
    mpp_y: float
    source: str
    estimated: bool = False

    @property
    def mpp(self) -> float:
        """µm/px, the geometric mean of both axes; for display and for choosing levels only."""
        return math.sqrt(self.mpp_x * self.mpp_y)


Overrides = Mapping[str, tuple[float, float]]
"""µm/px (x, y) by slide: its name or its file name."""


def resolve(name: str, file_name: str, claims: Claims, overrides: Overrides, mpp: float | None) -> Resolution:
    """Choose µm/px for a slide by the order above; `mpp` is for slides that credibly state none.

    Raises: SlideError `no_mpp` or `absurd_mpp`, naming the slide, what was found and both remedies.
    """
    for key in (file_name, name):
        if key in overrides:
            return Resolution(*overrides[key], "overrides table")
    for claim in claims.mpp:
        if claim.credible:
            return Resolution(claim.mpp_x, claim.mpp_y, claim.source)
    if mpp is not None:
        return Resolution(mpp, mpp, "given for slides without (mpp)")
    remedy = f"Give --mpp for all such slides, or a row `{name},0.25` (slide,mpp) in the overrides table (--overrides)."
    if claims.objective:
        value = ESTIMATE_AT_1X / claims.objective
        if Claim("", value, value).credible:
            return Resolution(value, value, f"objective power {claims.objective:g} (estimated)", estimated=True)
    if claims.mpp:
        found = "; ".join(
            f"{c.source} says {c.mpp_x:.4g} x {c.mpp_y:.4g} ({c.limits[0]:g} … {c.limits[1]:g} is believed)"
            for c in claims.mpp
        )
        raise SlideError("absurd_mpp", f"{name}: µm/px must be credible on both axes; {found}. {remedy}")
    raise SlideError(
        "no_mpp", f"{name}: µm/px must be known; {'; '.join(('the file states none', *claims.passed))}. {remedy}"
    )


def check_mpp(value: float, what: str) -> float:
    """Return a µm/px given by a user. Raises EngineError unless positive and finite (satellites measure 1e6)."""
    if not (math.isfinite(value) and value > 0):
        raise EngineError(f"{what} must be a positive number of µm/px; got {value:g}. 20x is about 0.5, 40x 0.25.")
    return value


def read_overrides(path: Path) -> dict[str, tuple[float, float]]:
    """Read a CSV with the columns slide and mpp, or slide, mpp_x and mpp_y; a slide is its name or its file name.

    Raises: EngineError naming the line that is wrong.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
            header = set(rows[0]) if rows else set()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EngineError(f"{path} must be a readable CSV of overrides; {error}.") from error
    if not ({"slide", "mpp"} <= header or {"slide", "mpp_x", "mpp_y"} <= header):
        columns = ", ".join(str(h) for h in sorted(header, key=str)) or "nothing"
        raise EngineError(
            f"{path} must have the columns slide,mpp or slide,mpp_x,mpp_y and at least one row; got {columns}."
        )
    found: dict[str, tuple[float, float]] = {}
    for line, row in enumerate(rows, 2):
        where = f"{path}, line {line}"
        slide, x, y = (row.get(key) or "" for key in ("slide", "mpp_x", "mpp_y"))
        x, y = x or row.get("mpp") or "", y or row.get("mpp") or ""
        if not slide or slide in found:
            raise EngineError(f"{where} must name a slide, once; got {slide!r}.")
        try:
            found[slide] = (check_mpp(float(x), where), check_mpp(float(y), where))
        except ValueError as error:
            raise EngineError(f"{where} must give µm/px as a number; got {x!r}, {y!r}.") from error
    return found


def ome_xml_claims(text: str, image: ElementTree.Element | None = None) -> Claims:
    """Read physical pixel size and objective of one Image of OME-XML (schema 2016-06), the first unless it is given.

    What is not there is not claimed: a size without a unit is in µm, one in "pixel" or with a blank unit is no length.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return Claims()
    if image is None:
        image = next(_named(root, "Image"), root)
    pixels = next(_named(image, "Pixels"), None)
    claims: Sequence[Claim] = ()
    if pixels is not None:
        sizes = [_ome_size(pixels.attrib, axis) for axis in "XY"]
        if sizes[0] is not None and sizes[1] is not None:
            claims = (Claim("OME-XML PhysicalSize", sizes[0], sizes[1]),)
    return Claims(tuple(claims), _ome_objective(root, image))


def _named(root: ElementTree.Element, tag: str) -> Iterator[ElementTree.Element]:
    """Yield the elements of a name, whatever version of the schema they belong to."""
    return (node for node in root.iter() if node.tag.rpartition("}")[2] == tag)


def _ome_objective(root: ElementTree.Element, image: ElementTree.Element) -> float | None:
    """Return the power of the objective that an image names, or of the only one there is."""
    objectives = list(_named(root, "Objective"))
    settings = next(_named(image, "ObjectiveSettings"), None)
    if settings is not None:
        objectives = [node for node in objectives if node.attrib.get("ID") == settings.attrib.get("ID")]
    return number(objectives[0].attrib.get("NominalMagnification")) if len(objectives) == 1 else None


def _ome_size(attributes: Mapping[str, str], axis: str) -> float | None:
    size = number(attributes.get(f"PhysicalSize{axis}"))
    return None if size is None else microns(size, attributes.get(f"PhysicalSize{axis}Unit", "µm"))


def tiff_claim(x: object, y: object, unit: object) -> Claim | None:
    """Read TIFF's XResolution, YResolution and ResolutionUnit, as they are stored; None if they are no length."""
    found = per_px((x, y), tiff_unit(unit))
    return None if found is None else Claim("TIFF resolution", *found)


def imagej_claim(x: object, y: object, metadata: Mapping[str, Any] | None) -> Claim | None:
    """Read ImageJ's scale: px per unit in TIFF's tags, the unit in ImageJ's own text; None if that names no length."""
    if not metadata:
        return None
    across, down = metadata.get("unit"), metadata.get("yunit", metadata.get("unit"))
    found = per_px((x, y), microns_per(across)), per_px((x, y), microns_per(down))
    return None if found[0] is None or found[1] is None else Claim("ImageJ unit", found[0][0], found[1][1])


def geotiff_claim(tags: Mapping[str, Any] | None) -> Claim | None:
    """Read the pixel scale among a picture's GeoTIFF tags, by tifffile's names; None if it is not one on the ground.

    Degrees of a geographic system are no length, those of Web Mercator are not lengths on the ground.
    """
    unit = ground_unit(tags) if tags else None
    scale = tags.get("ModelPixelScale", ()) if tags else ()
    x, y = (number(v) for v in scale[:2]) if isinstance(scale, Sequence) and len(scale) >= 2 else (None, None)
    if unit is None or x is None or y is None:
        return None
    return Claim("GeoTIFF pixel scale", x * unit, y * unit, (FINEST_GROUND, COARSEST_GROUND))
