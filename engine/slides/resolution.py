"""Decide how many µm a level-0 px of a slide measures, and say where the value comes from.

Invariant: a value is taken from a named source or the slide is refused; nothing is rounded to a magnification and
nothing is guessed in silence. It opens no slide: backends hand in what the file claims.

Order: overrides table > the vendor's own property > OME-XML or OME-NGFF > pixel scale of a projected GeoTIFF > TIFF
resolution > the value given for slides that state none (`mpp`) > objective power, marked as estimated > refusal. A
claim outside 0.05 … 10 µm/px (GeoTIFF: 1 mm … 10 km) is passed over and named: 72 and 96 dpi, written by programs
that know no scale, would be 353 and 265 µm/px.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from engine.errors import EngineError, SlideError

FINEST_MPP, COARSEST_MPP = 0.05, 10.0
"""µm/px of any scanner, with room on both sides."""
FINEST_GROUND, COARSEST_GROUND = 1e3, 1e10
"""µm/px of any picture from above: 1 mm (drones) … 10 km (weather satellites)."""
ESTIMATE_AT_1X = 10.0
"""µm/px at objective power 1: 40x is about 0.25, 20x about 0.5."""
_MICRONS = {
    "": 1.0,
    "m": 1e6, "meter": 1e6, "metre": 1e6,
    "dm": 1e5, "decimeter": 1e5,
    "cm": 1e4, "centimeter": 1e4, "centimetre": 1e4,
    "mm": 1e3, "millimeter": 1e3, "millimetre": 1e3,
    "um": 1.0, "µm": 1.0, "μm": 1.0, "micron": 1.0, "micrometer": 1.0, "micrometre": 1.0,
    "nm": 1e-3, "nanometer": 1e-3, "nanometre": 1e-3,
    "pm": 1e-6, "picometer": 1e-6,
    "Å": 1e-4, "angstrom": 1e-4,
    "in": 25400.0, "inch": 25400.0,
}  # fmt: skip
"""Length units of OME-XML and OME-NGFF in µm; no unit means µm (OME schema 2016-06)."""
_GEO_MICRONS = {9001: 1e6, 9002: 0.3048e6, 9003: 1200 / 3937 * 1e6}
"""ProjLinearUnitsGeoKey → µm: metre, foot, US survey foot (GeoTIFF 1.1, EPSG)."""
_PROJECTED = 1
_WEB_MERCATOR = 3857
"""Its metres are those of the equator: at 60° they are half a metre on the ground."""


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
    raise SlideError("no_mpp", f"{name}: µm/px must be known; the file states none. {remedy}")


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
    for number, row in enumerate(rows, 2):
        where = f"{path}, line {number}"
        slide, x, y = (row.get(key) or "" for key in ("slide", "mpp_x", "mpp_y"))
        x, y = x or row.get("mpp") or "", y or row.get("mpp") or ""
        if not slide or slide in found:
            raise EngineError(f"{where} must name a slide, once; got {slide!r}.")
        try:
            found[slide] = (check_mpp(float(x), where), check_mpp(float(y), where))
        except ValueError as error:
            raise EngineError(f"{where} must give µm/px as a number; got {x!r}, {y!r}.") from error
    return found


def microns(value: float, unit: str) -> float | None:
    """Return a length in µm, or None for a unit that is no length (as OME's "pixel")."""
    factor = _MICRONS.get(unit, _MICRONS.get(unit.lower()))
    return None if factor is None else value * factor


def ome_xml_claims(text: str) -> Claims:
    """Read physical pixel size and objective from OME-XML (schema 2016-06); what is not there is not claimed."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return Claims()
    pixels = next((node for node in root.iter() if node.tag.rpartition("}")[2] == "Pixels"), None)
    objective = next((node for node in root.iter() if node.tag.rpartition("}")[2] == "Objective"), None)
    claims: Sequence[Claim] = ()
    if pixels is not None:
        sizes = [_ome_size(pixels.attrib, axis) for axis in "XY"]
        if sizes[0] is not None and sizes[1] is not None:
            claims = (Claim("OME-XML PhysicalSize", sizes[0], sizes[1]),)
    power = parse_number(objective.attrib.get("NominalMagnification")) if objective is not None else None
    return Claims(tuple(claims), power)


def _ome_size(attributes: Mapping[str, str], axis: str) -> float | None:
    size = parse_number(attributes.get(f"PhysicalSize{axis}"))
    return None if size is None else microns(size, attributes.get(f"PhysicalSize{axis}Unit", ""))


def parse_number(text: str | None) -> float | None:
    """Return a positive finite number written in a file's metadata, or None: "0", "nan" and "n/a" claim nothing."""
    try:
        value = float((text or "").replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def tiff_claim(x: tuple[int, int] | None, y: tuple[int, int] | None, unit: int) -> Claim | None:
    """Read TIFF XResolution and YResolution (px per unit, as fractions); unit 2 is inch, 3 is cm, 1 is no unit."""
    microns_per_unit = {2: 25400.0, 3: 10000.0}.get(unit)
    if microns_per_unit is None or not x or not y or min(*x, *y) <= 0:
        return None
    if x == y == (1, 1):  # what writers put in when they are told nothing
        return None
    return Claim("TIFF resolution", microns_per_unit * x[1] / x[0], microns_per_unit * y[1] / y[0])


def geotiff_claim(tags: Mapping[str, Any] | None) -> Claim | None:
    """Read the pixel scale among a picture's GeoTIFF tags, by tifffile's names; None if it is not one on the ground.

    Degrees of a geographic system are no length, those of Web Mercator are not lengths on the ground.
    """
    if not tags or tags.get("GTModelTypeGeoKey") != _PROJECTED or tags.get("ProjectedCSTypeGeoKey") == _WEB_MERCATOR:
        return None
    unit, scale = _GEO_MICRONS.get(tags.get("ProjLinearUnitsGeoKey", 0)), tags.get("ModelPixelScale", ())
    if unit is None or len(scale) < 2 or not all(math.isfinite(v) and v > 0 for v in scale[:2]):
        return None
    return Claim("GeoTIFF pixel scale", scale[0] * unit, scale[1] * unit, (FINEST_GROUND, COARSEST_GROUND))
