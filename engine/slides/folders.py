"""Look through a folder and all below it, links to folders too.

Invariant: each real folder is looked through once, under its own name where it has one below the first folder, else
under its first link's; so links that lead in a circle end, and no file comes twice because a folder is linked. What
begins with a dot is skipped. Whatever else is not looked through is named with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Found:
    """What lies in a folder."""

    paths: list[Path] = field(default_factory=list)
    """What was wanted, in no order."""
    left_out: list[str] = field(default_factory=list)
    """What could not be looked through, with the reason: one line each."""


def look_through(folder: Path, wanted: Callable[[Path], bool]) -> Found:
    """Return what is `wanted` in a folder or below; a folder that is wanted is not looked through."""
    found, seen, links = Found(), set[tuple[int, int]](), [folder]
    home = folder.resolve()
    while links:
        link = links.pop(0)
        if link != folder and home.is_relative_to(link.resolve()) and link.resolve() != home:
            found.left_out.append(f"{link}: a link to a folder that holds {folder} itself")
            continue
        folders = [link]
        while folders:
            place = folders.pop()
            try:
                entries = _unseen(place, seen)
            except OSError as error:
                found.left_out.append(f"{place}: {error.strerror}")
                continue
            for entry in entries:
                _sort(entry, wanted, found, folders, links)
    return found


def _unseen(place: Path, seen: set[tuple[int, int]]) -> list[Path]:
    """Return what a folder holds, nothing if it was seen under another name. Raises OSError."""
    at = place.stat()
    if (at.st_dev, at.st_ino) in seen:
        return []
    entries = sorted(place.iterdir())
    seen.add((at.st_dev, at.st_ino))
    return entries


def _sort(entry: Path, wanted: Callable[[Path], bool], found: Found, folders: list[Path], links: list[Path]) -> None:
    """Put an entry where it belongs; a file that is not wanted is passed over."""
    if entry.name.startswith("."):
        return
    try:
        if wanted(entry):
            found.paths.append(entry)
        elif entry.is_dir():
            # Links wait until all real folders are seen: a folder below keeps its own name.
            (links if entry.is_symlink() else folders).append(entry)
        elif entry.is_symlink() and not entry.exists():
            found.left_out.append(f"{entry}: a link to {entry.readlink()}, which is not there")
    except OSError as error:
        found.left_out.append(f"{entry}: {error.strerror}")
