"""Which picture of a file is read where it holds several: a scan beside a label, a macro, an overview, other scans.

Invariant: one picture is chosen, by number or else the largest that is no label or overview, and what is left out is
said. It knows names and sizes, no files.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.core.errors import SlideError

_ASIDE = re.compile(
    r"(?:^|[^a-z]|slide|scan)(label|macro|overview|thumbnail|thumb|preview|barcode)s?(?:$|[^a-z]|image)", re.IGNORECASE
)


@dataclass(frozen=True)
class Part:
    """One picture of a file, at its full size."""

    name: str
    size: tuple[int, int]
    """(h, w) in px."""
    aside: bool = False
    """Whether the file marks it as a label, an overview or a reduced copy."""

    @property
    def is_aside(self) -> bool:
        """Whether it is, by its mark or its name, not what was scanned at full size."""
        return self.aside or _ASIDE.search(self.name) is not None

    def told(self, index: int) -> str:
        """Return its number, name and size (width x height)."""
        name = f" ({self.name})" if self.name else ""
        return f"{index}{name} {self.size[1]}x{self.size[0]}"


@dataclass(frozen=True)
class Choice:
    """The picture that is read."""

    index: int = 0
    told: str = ""
    """Which one, and what is left out; empty if the file holds one."""
    doubtful: bool = False
    """Whether another picture might have been meant: one was left out that is no label, and nobody chose."""


ONLY = Choice()
"""Of a file that holds one picture."""


def choose(name: str, parts: Sequence[Part], series: int | None) -> Choice:
    """Choose a picture: number `series`, else the largest that is no label, macro or overview; the first of equals.

    Raises: SlideError `no_such_series`, listing what the file holds.
    """
    if series is not None and not 0 <= series < len(parts):
        held = "; ".join(part.told(i) for i, part in enumerate(parts))
        raise SlideError(
            "no_such_series",
            f"{name}: series must be the number of a picture that the file holds ({held}); got {series}. Choose one "
            "of them, or leave it out.",
        )
    if len(parts) == 1:
        return ONLY
    candidates = [i for i, part in enumerate(parts) if not part.is_aside] or list(range(len(parts)))
    index = series
    if index is None:
        index = max(candidates, key=lambda i: (parts[i].size[0] * parts[i].size[1], -i))
    others = [part.told(i) for i, part in enumerate(parts) if i != index]
    told = f"series {parts[index].told(index)}; left out: {', '.join(others)}"
    return Choice(index, told, series is None and len(candidates) > 1)


def only_one(name: str, series: int | None) -> None:
    """Refuse another number than 0 for a file that is read as one picture. Raises SlideError `no_such_series`."""
    if series not in (None, 0):
        raise SlideError(
            "no_such_series",
            f"{name}: series must be 0 or not given, its format is read as one picture; got {series}. Leave it out.",
        )
