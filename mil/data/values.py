"""What a cell of a table says: a text, a number, or nothing at all.

It knows spellings of people, spreadsheets and statistics programs, not columns, tasks or files. Sources: what R,
pandas, Excel and the tables of TCGA write where there is no value.
"""

import re
from collections.abc import Iterable

from engine.core.documents.tables import clean

_PUNCTUATION = re.compile(r"[\s\-–—−_.…·/\\?#!()\[\]{}<>'\"`,:;|&]+")  # without + and *, which stand for findings
_NOT = (
    "available",
    "applicable",
    "assessed",
    "evaluated",
    "reported",
    "recorded",
    "known",
    "determined",
    "done",
    "tested",
)
_NOTHING = frozenset(
    (
        *("", "na", "n a", "na na", "n a n a", "nan", "1 ind", "1 qnan", "ind", "qnan", "null", "none", "nil", "empty"),
        *("nd", "n d", "nk", "unk", "unknown", "undefined", "undetermined", "missing", "no data", "no value", "blank"),
        *("tbd", "tba", "to be determined", "pending", *(f"not {word}" for word in _NOT)),
    )
)
_SHEET_ERROR = re.compile(r"#(N/?[AVD]|[\w/]+[!?])", re.IGNORECASE)
_DIGITS = {sign: rf"(\d*|[1-9]\d{{0,2}}(\{group}\d{{3}})+)(\{sign}\d*)?" for sign, group in (".,", ",.")}
_NUMBERS = {sign: re.compile(rf"[+-]?(?=.?\d){body}([eE][+-]?\d+)?") for sign, body in _DIGITS.items()}


def says_nothing(text: str) -> bool:
    """Say whether a cell is empty, or filled with what stands for no value: NA, N/A, nan, null, None, -, #N/A, …"""
    words = _PUNCTUATION.sub(" ", clean(text).casefold()).strip()
    return words in _NOTHING or _SHEET_ERROR.fullmatch(clean(text)) is not None


def decimal_sign(cells: Iterable[str], separator: str) -> str | None:
    """Return the decimal sign a column of numbers shows: "." or ","; "" when it shows both; None when it shows neither.

    Spreadsheets put semicolons between cells where the comma is the decimal sign, so there it is taken for one.
    """
    readings = [found for cell in cells if (found := _readings(cell))]
    shown = {sign for found in readings if len(found) == 1 for sign in found}
    if shown:
        return "" if len(shown) > 1 else shown.pop()
    unclear = [cell for cell in cells if len(set(_readings(cell).values())) > 1]
    if separator != ";" or not unclear:
        return None
    return "," if all("," in cell for cell in unclear) else ""


def number(text: str, sign: str | None = None) -> float | None:
    """Return the finite number a cell says, or None. `sign` is what `decimal_sign` says of its column.

    "1,234" is a number only where the column shows what its comma means; "1.234" is one unless it shows commas.
    """
    readings = _readings(text)
    if len(set(readings.values())) == 1:
        return next(iter(readings.values()))
    if sign is None and "." in text:
        return readings.get(".")
    return readings.get(sign or "")


def two_readings(text: str) -> tuple[float, ...]:
    """Return the numbers that a cell may say, by the meaning of its comma or point; () for one or none."""
    values = tuple(dict.fromkeys(_readings(text).values()))
    return values if len(values) > 1 else ()


def _readings(text: str) -> dict[str, float]:
    """Return what a cell says under each decimal sign that it can have."""
    text = clean(text).replace("\u2212", "-")
    found = {}
    for sign, pattern in _NUMBERS.items():
        if pattern.fullmatch(text):
            value = float(text.replace("," if sign == "." else ".", "").replace(",", "."))
            if abs(value) != float("inf"):
                found[sign] = value
    return found
