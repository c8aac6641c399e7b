"""What may be shown: the given path, the runs, slides and pictures in it, and nothing outside.

Invariant: a file is opened only after its real path, links followed, is found below the folder that was given. The
browser never names a path: it names an item by a digest of its place. It knows names of files, not their content.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.core.errors import EngineError
from engine.images.ome_zarr import is_ours
from engine.slides.slide import SLIDE_SUFFIXES

Kind = Literal["run", "picture", "dzi", "slide"]
MOST_ITEMS = 2000
DEEPEST = 8
"""Folders below the given one."""
MOST_ENTRIES = 200_000
"""Names that are looked at."""
NO_SLIDES = ("report.json", "study.json")
"""An extraction or a study: what it holds as PNG and JPEG are figures and thumbnails, not slides."""


class OutsideError(EngineError):
    """A path leads out of what was given."""


@dataclass(frozen=True)
class Item:
    """Something to look at."""

    id: str
    kind: Kind
    path: Path
    name: str
    """Its place below what was given, for people."""
    root: Path
    """The folder that nothing of it may lie outside of; real, without links."""

    def inside(self, path: Path) -> Path:
        """Return the real path. Raises: OutsideError if it lies elsewhere."""
        real = path.resolve()
        if real != self.root and not real.is_relative_to(self.root):
            raise OutsideError(
                f"{path} must lie in {self.root}; it is a link to {real}. Open a folder that holds both, or copy it."
            )
        return real

    def hold(self, folder: Path) -> None:
        """Refuse a folder of chunks in which a link leads out. Raises: OutsideError."""
        self.inside(folder)
        for place, folders, files in os.walk(folder):
            for name in (*folders, *files):
                path = Path(place, name)
                if path.is_symlink():
                    self.inside(path)


@dataclass
class Found:
    """What lies in a folder."""

    items: list[Item] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What cannot be shown, with the reason: one line each."""


def kind_of(path: Path) -> Kind | None:
    """Return what a path is to the viewer; None for a folder of others and for foreign files."""
    if path.is_dir():
        if (path / "state.json").is_file():
            return "run"
        if is_ours(path):
            return "picture"
        return "slide" if path.suffix.lower() == ".zarr" else None
    if path.suffix.lower() == ".dzi":
        return "dzi"
    return "slide" if path.suffix.lower() in SLIDE_SUFFIXES or path.suffix.lower() == ".dcm" else None


def look(given: Path) -> Found:
    """Return what to show of a path. Raises: EngineError when there is nothing, or none of it can be shown."""
    if not given.exists():
        raise EngineError(f"{given} must be a run, a slide, a picture or a folder of them; it does not exist.")
    root = given.resolve()
    kind = kind_of(root)
    if kind is not None:
        home = root.parent if root.is_file() else root
        return Found([item_of(root, kind, home, given.name or root.name)])
    if root.is_file():
        raise EngineError(
            f"{given} must be a slide or a picture ({', '.join(SLIDE_SUFFIXES)}, .dzi); it is none by its ending."
        )
    found = Found()
    _gather(root, root, 0, found, iter(range(MOST_ENTRIES)))
    found.items.sort(key=lambda item: item.name)
    if not found.items:
        more = f" Left out: {'; '.join(found.left_out[:3])}." if found.left_out else ""
        raise EngineError(
            f"{given} must be a run (with state.json), a slide, or a folder that holds some; it holds none.{more} "
            "Check the path."
        )
    return found


def item_of(path: Path, kind: Kind, root: Path, name: str) -> Item:
    """Return the item at a real path; its id stays the same when the viewer is started again."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return Item(digest, kind, path, name.encode("utf-8", "replace").decode(), root)


def _gather(folder: Path, root: Path, depth: int, found: Found, budget: Iterator[int]) -> None:
    """Add what lies in a folder and below; links to folders are not followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        found.left_out.append(f"{folder}: {error.strerror}")
        return
    names = {entry.name for entry in entries}
    figures = not names.isdisjoint(NO_SLIDES)
    for entry in entries:
        path, stem = Path(entry.path), entry.name.removesuffix("_files")
        if entry.name.startswith(".") or (stem != entry.name and f"{stem}.dzi" in names):
            continue
        if next(budget, None) is None or len(found.items) >= MOST_ITEMS:
            line = f"{root}: more than {MOST_ITEMS} items or {MOST_ENTRIES} names; the rest is not listed"
            found.left_out += [] if line in found.left_out else [line]
            return
        kind = kind_of(path)
        if kind is not None:
            _take(path, kind, root, found)
        elif entry.is_dir(follow_symlinks=False) and depth < DEEPEST and not figures:
            _gather(path, root, depth + 1, found, budget)
        elif entry.is_symlink() and path.is_dir():
            found.left_out.append(f"{path.relative_to(root)}: a link to a folder, not followed")


def _take(path: Path, kind: Kind, root: Path, found: Found) -> None:
    item = item_of(path, kind, root, str(path.relative_to(root)))
    try:
        item.inside(path)
    except OutsideError as error:
        found.left_out.append(str(error))
    else:
        found.items.append(item)
