"""Names of slides and patients as tables and files spell them: which two are the same, and which is near.

Invariant: two different names are taken for one only where no third name could be meant. It does not know tables or
files. The endings are those of slides and of features files.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

from engine.core.documents.tables import clean

_ENDINGS = (
    *(".svs", ".tif", ".tiff", ".btf", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".zarr"),
    *(".qptiff", ".isyntax", ".dcm", ".png", ".jpg", ".jpeg", ".ome", ".h5", ".hdf5", ".pt", ".pth"),
)
_WHOLE = re.compile(r"0*(\d+)(\.0+)?")
_SHORTENED = re.compile(r"\d[.,]?\d*[eE]\+?\d+")


def name_key(name: str) -> str:
    """Return what names have in common that differ only by Unicode form, ending, `.0` or leading zeros."""
    name = clean(name)
    while ending := next((e for e in _ENDINGS if name.lower().endswith(e) and len(name) > len(e)), ""):
        name = name[: -len(ending)]
    number = _WHOLE.fullmatch(name)
    return number[1] if number else name


def match_names(wanted: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return the known name of each wanted one: itself, or the only one of its key if no other wanted name has that.

    Names that match nothing, or more than one, are absent.
    """
    wanted, known = dict.fromkeys(wanted), dict.fromkeys(known)
    sought = Counter(name_key(name) for name in wanted)
    there: dict[str, list[str]] = {}
    for name in known:
        there.setdefault(name_key(name), []).append(name)
    found = {}
    for name in wanted:
        same = there.get(name_key(name), [])
        if name in known:
            found[name] = name
        elif len(same) == 1 and sought[name_key(name)] == 1:
            found[name] = same[0]
    return found


def similar_names(absent: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return, for names that look like known ones, those in words: " (near 'S1')"; for whoever lists what is absent."""
    loose = _by_looks(known)
    near = {name: loose.get(_loose(name)) for name in absent}
    return {name: f" (near {' and '.join(map(repr, found[:3]))})" for name, found in near.items() if found}


def near_names(absent: Iterable[str], known: Iterable[str], limit: int = 3) -> str:
    """Return a sentence that names what is near to the first few names, with a blank before it; "" when nothing is."""
    known = list(dict.fromkeys(known))
    loose = _by_looks(known)
    said = []
    for name in list(absent)[:limit]:
        near = loose.get(_loose(name)) or get_close_matches(name, known, 1, 0.75)
        if _SHORTENED.fullmatch(clean(name)):
            said.append(f"{name!r} looks like a long number that a spreadsheet shortened (format the column as text)")
        elif near:
            said.append(f"{name!r} is near {' and '.join(map(repr, near[:3]))}")
    return f" {'; '.join(said)}." if said else ""


def _by_looks(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        found.setdefault(_loose(name), []).append(name)
    return found


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of different names that somebody may have meant as one: as `name_key`, or by case or width."""
    return [(same[0], other) for same in _by_looks(names).values() for other in same[1:]]


def changed(matches: Mapping[str, str], used: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Return those matches to `used` names whose two names are not spelt alike."""
    return tuple((name, other) for name, other in matches.items() if name != other and other in used)


def _loose(name: str) -> str:
    """Return a key of names that look alike: case, full-width letters, kinds of dashes and blanks do not count."""
    text = unicodedata.normalize("NFKC", name_key(name)).casefold()
    return name_key(re.sub(r"[\s_\-‐‑‒–—−]+", "-", text))
