"""Numbers and units of length as files write them → µm, or None: what is no length claims nothing.

Invariant: no unit is guessed. A unit that is not known, is blank, or is none ("pixel", "reference frame",
ResolutionUnit 1) is no claim, as is a number that is zero, negative, not finite or a fraction over zero. It knows no
files and no order of trust. Sources: TIFF 6.0 (section 8), OME schema 2016-06 (UnitsLength), UDUNITS-2, GeoTIFF 1.1
and the EPSG data set.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SYMBOLS = {
    # OME's, in which upper and lower case differ: Mm is a million metres, mm a thousandth of one.
    "Ym": 1e30, "Zm": 1e27, "Em": 1e24, "Pm": 1e21, "Tm": 1e18, "Gm": 1e15, "Mm": 1e12, "km": 1e9, "hm": 1e8,
    "dam": 1e7, "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "um": 1.0, "nm": 1e-3, "pm": 1e-6,
    "fm": 1e-9, "am": 1e-12, "zm": 1e-15, "ym": 1e-18, "Å": 1e-4, "thou": 25.4, "li": 25400 / 12, "in": 25400.0,
    "ft": 304800.0, "yd": 914400.0, "mi": 1609.344e6,
}  # fmt: skip
"""µm by symbol; a line is a twelfth of an inch."""
_PREFIXES = {
    "": 1e6, "yotta": 1e30, "zetta": 1e27, "exa": 1e24, "peta": 1e21, "tera": 1e18, "giga": 1e15, "mega": 1e12,
    "kilo": 1e9, "hecto": 1e8, "deca": 1e7, "deka": 1e7, "deci": 1e5, "centi": 1e4, "milli": 1e3, "micro": 1.0,
    "nano": 1e-3, "pico": 1e-6, "femto": 1e-9, "atto": 1e-12, "zepto": 1e-15, "yocto": 1e-18,
}  # fmt: skip
_WORDS = {
    "micron": 1.0, "microns": 1.0, "angstrom": 1e-4, "angstroms": 1e-4, "ångström": 1e-4, "inch": 25400.0,
    "inches": 25400.0, "foot": 304800.0, "feet": 304800.0, "yard": 914400.0, "yards": 914400.0, "mile": 1609.344e6,
    "miles": 1609.344e6,
} | {
    f"{prefix}{metre}{plural}": value
    for prefix, value in _PREFIXES.items() for metre in ("meter", "metre") for plural in ("", "s")
}  # fmt: skip
"""µm by name, in any case."""
_SAME = str.maketrans({"μ": "µ", "\N{ANGSTROM SIGN}": "Å"})
"""Letters that look alike and are stored as either."""
_TIFF = {2: 25400.0, 3: 1e4, 4: 1e3, 5: 1.0}
"""ResolutionUnit → µm: inch, cm; mm and µm are later additions of DNG. 1 is no unit."""
_EPSG = {
    9001: 1.0, 9002: 0.3048, 9003: 12 / 39.37, 9005: 0.3047972654, 9014: 1.8288, 9030: 1852.0, 9031: 1.0000135965,
    9033: 792 / 39.37, 9034: 7.92 / 39.37, 9035: 63360 / 39.37, 9036: 1000.0, 9037: 0.9143917962,
    9038: 20.1166195164, 9039: 0.201166195164, 9040: 0.9143984146, 9041: 0.3047994715, 9042: 20.1167651216,
    9043: 0.201167651216, 9080: 0.3047995103, 9093: 1609.344, 9094: 0.3047997102, 9095: 0.3048007491, 9096: 0.9144,
    9097: 20.1168, 9098: 0.201168, 1025: 0.001, 1033: 0.01,
}  # fmt: skip
"""Unit of length by its EPSG code → m."""
_IN_METRES = (
    (32601, 32660), (32701, 32760), (32201, 32260), (32301, 32360), (26901, 26923), (26701, 26722), (25828, 25838),
    (23028, 23038), (28348, 28358), (7846, 7859), (31965, 31985), (3034, 3035), (3067, 3067), (27700, 27700),
    (2154, 2154), (28992, 28992), (21781, 21781), (2056, 2056),
)  # fmt: skip
"""Ranges of EPSG codes of projected systems in metres: UTM of WGS 84, WGS 72, NAD83, NAD27, ETRS89, ED50, GDA94 and
GDA2020 (MGA), SIRGAS 2000; the systems of Europe (LAEA, LCC), Finland, Britain, France, the Netherlands, Switzerland.
"""
_STRETCHED = frozenset({3857, 3785, 3395, 900913, 102100, 102113, 41001, 54004, 3832, 4087, 4088, 32662, 32663})
"""Mercator and plate carrée: their metres are those of the equator; at 60° they are half a metre on the ground."""
_STRETCHED_BY = frozenset({7, 17})
"""The same by ProjCoordTransGeoKey: CT_Mercator, CT_Equirectangular."""
_PROJECTED, _USER_DEFINED = 1, 32767


def number(value: object) -> float | None:
    """Return a positive finite number from what metadata hold: text (decimal comma too), int, float or a fraction.

    None for all else: "0", "nan", "n/a", (1, 0) and lists claim nothing.
    """
    try:
        if isinstance(value, str):
            found = float(value.strip().replace(",", "."))
        elif isinstance(value, tuple) and len(value) == 2:
            found = float(value[0]) / float(value[1])
        elif isinstance(value, tuple) and len(value) == 1:  # tifffile's form of a resolution that is no fraction
            found = float(value[0])
        else:
            found = float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, ArithmeticError):
        return None
    return found if math.isfinite(found) and found > 0 else None


def microns_per(unit: object) -> float | None:
    """Return how many µm a unit of length is, by its symbol (case counts) or its name (case does not); else None."""
    if not isinstance(unit, str):
        return None
    # ImageJ escapes what is not ASCII.
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), unit)
    text = text.strip().rstrip(".").translate(_SAME)
    return _SYMBOLS.get(text, _WORDS.get(text.lower()))


def microns(value: float, unit: object) -> float | None:
    """Return a length in µm, or None for a unit that is no length (as OME's "pixel")."""
    factor = microns_per(unit)
    return None if factor is None else value * factor


def per_px(px_per_unit: Sequence[object], microns_per_unit: float | None) -> tuple[float, float] | None:
    """Return µm/px (x, y) from px per unit on both axes, as TIFF stores them: fractions, floats or whole numbers.

    1 on both axes is what writers put in when they are told nothing.
    """
    x, y = (number(value) for value in px_per_unit)
    if microns_per_unit is None or x is None or y is None or x == y == 1:
        return None
    return microns_per_unit / x, microns_per_unit / y


def tiff_unit(value: object) -> float | None:
    """Return the µm of a ResolutionUnit; a tag that is not there (None) means inch (TIFF 6.0), 1 means no length."""
    # Its enum is falsy where it says "none", so it is never asked whether it is true.
    try:
        return _TIFF.get(2 if value is None else int(value))  # type: ignore[call-overload]
    except (ValueError, TypeError):
        return None


def ground_unit(tags: Mapping[str, Any]) -> float | None:
    """Return the µm of the unit of a GeoTIFF's projected system, by tifffile's names of its keys; None if it has none.

    Degrees are no length, and neither is a unit that only the database of all systems could name. The unit's own key
    counts first, then the size that a system of one's own states, then the system's EPSG code.
    """
    system, unit = tags.get("ProjectedCSTypeGeoKey"), tags.get("ProjLinearUnitsGeoKey")
    if tags.get("GTModelTypeGeoKey") != _PROJECTED or system in _STRETCHED:
        return None
    if tags.get("ProjCoordTransGeoKey") in _STRETCHED_BY:
        return None
    if unit == _USER_DEFINED:
        metres = number(tags.get("ProjLinearUnitSizeGeoKey"))
    elif unit:
        metres = _EPSG.get(unit)
    else:
        known = isinstance(system, int) and any(first <= system <= last for first, last in _IN_METRES)
        metres = 1.0 if known else None
    return None if metres is None else metres * 1e6
