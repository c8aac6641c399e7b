"""The most attended tiles of a study: a table and, where slides are at hand, pictures.

It knows a run's folder and HTML; how a slide is read is somebody else's affair (`ReadField`).
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from engine.core.documents import html
from engine.core.errors import EngineError

TOP_SLIDES, TOP_TILES = 6, 5
PICTURE_PX = 224
SURROUNDINGS = 4
"""Sides of a tile that the second picture is wide: of a 20x tile, about the 5x tile around it."""
FRAME = (20, 90, 220)


class ReadField(Protocol):
    """Reads pixels of a slide by its name."""

    def __call__(
        self, slide: str, corner: tuple[float, float], size: tuple[float, float], px: int, series: int | None = None
    ) -> NDArray:
        """Return a field (x, y and width, height in level-0 px; it may reach beyond) as uint8 (h, px, 3) RGB.

        `series` is the number of the picture, of a file that holds several; None takes the one a slide opens with.
        Raises: EngineError when there is no such slide or it cannot be read.
        """
        ...


@dataclass(frozen=True)
class AttendedSlide:
    """The most attended tiles of one tested slide, most attended first."""

    name: str
    logit: float
    attention: NDArray[np.float32]
    """(k,)"""
    times_even: NDArray[np.float32]
    """(k,): attention as a multiple of the even share."""
    coords: NDArray[np.int64] | None
    """(k, 2) x, y in level-0 px; None when the features do not say."""
    tile: tuple[float, float] | None
    """Width and height of a tile in level-0 px; None when the features do not say."""
    series: int | None = None
    """Number of the picture that the features are of, where its file holds several."""


def most_attended(folder: Path) -> list[AttendedSlide]:
    """Return the tested slides of the first repeat with the highest logits of their true class, highest first.

    Of two classes only positive slides; of more, as many of each class.
    """
    found: dict[int, list[tuple[float, str, Path]]] = {}
    for path in sorted(folder.glob("folds/repeat0_*/attention.h5")):
        with h5py.File(path, "r") as file:
            for name, group in file.items():
                label, logits = int(group.attrs["label"]), np.atleast_1d(group.attrs["logit"])
                if len(logits) > 1 or label == 1:
                    own = float(logits[label] if len(logits) > 1 else logits[0])
                    found.setdefault(label, []).append((own, name, path))
    each = max(1, TOP_SLIDES // max(1, len(found)))
    best = [one for label in sorted(found) for one in sorted(found[label], reverse=True)[:each]]
    return [_top_of(path, name, logit) for logit, name, path in best]


def _top_of(path: Path, name: str, logit: float) -> AttendedSlide:
    with h5py.File(path, "r") as file:
        attention = np.asarray(file[f"{name}/attention"])
        rows = np.argsort(-attention, kind="stable")[:TOP_TILES]
        coords = np.asarray(file[f"{name}/coords"])[rows] if f"{name}/coords" in file else None
        side = file[name].attrs.get("tile_level0_px")
        series = file[name].attrs.get("series")
    tile = None if side is None else (float(side[0]), float(side[1]))
    chosen = None if series is None else int(series)
    return AttendedSlide(name, logit, attention[rows], attention[rows] * len(attention), coords, tile, chosen)


def attended(folder: Path, read: ReadField | None, classes: Sequence[str] = ()) -> str:
    """Return the report's part about the most attended tiles; `read` makes pictures of them.

    `classes` are the names of more than two.
    """
    slides = most_attended(folder)
    rows = []
    for slide in slides:
        for at, share in enumerate(slide.attention):
            place = "unknown" if slide.coords is None else f"{slide.coords[at, 0]}, {slide.coords[at, 1]}"
            rows.append([slide.name, f"{slide.logit:.2f}", place, f"{share:.2%}", f"{slide.times_even[at]:.1f}"])
    first = f"slide (tested; best of {', '.join(classes)})" if classes else "slide (tested, truly positive)"
    head = [first, "logit", "x, y (level-0 px)", "attention", "times the even share"]
    note = "python -m mil.heatmap RUN --slide NAME draws the attention of a whole slide."
    if read is None:
        note += " The same training command with --slides DIR shows these tiles as pictures."
    pictures = "" if read is None else "".join(_strip(slide, read) for slide in slides)
    return pictures + html.folded(f"{len(rows)} tiles", html.table(head, rows)) + html.paragraph(note, "soft")


def _strip(slide: AttendedSlide, read: ReadField) -> str:
    """Return one slide's tiles, each with its surroundings; a slide that cannot be read says why."""
    try:
        pictures = list(_pictures(slide, read))
    except EngineError as error:
        return html.paragraph(f"{slide.name}: no pictures. {error}", "soft")
    title = (
        f"{slide.name}, logit {slide.logit:.2f}: tiles, most attended first, and {SURROUNDINGS} times as much around"
    )
    return html.paragraph(title) + f'<div class="tiles">{"".join(pictures)}</div>'


def _pictures(slide: AttendedSlide, read: ReadField) -> Iterator[str]:
    if slide.coords is None or slide.tile is None:
        raise EngineError("Its features file does not say where tiles lie, or how large they are.")
    size = np.array(slide.tile)
    for corner, times in zip(slide.coords, slide.times_even, strict=True):
        tile = Image.fromarray(read(slide.name, tuple(corner.tolist()), slide.tile, PICTURE_PX, slide.series))
        wide = tuple((corner - size * (SURROUNDINGS - 1) / 2).tolist()), tuple((size * SURROUNDINGS).tolist())
        around = Image.fromarray(read(slide.name, *wide, PICTURE_PX, slide.series))
        edges = [at * (SURROUNDINGS + sign) / (2 * SURROUNDINGS) for sign in (-1, 1) for at in around.size]
        ImageDraw.Draw(around).rectangle(edges, outline=FRAME, width=2)
        words = f"{times:.1f} times the even share, at {corner[0]}, {corner[1]}"
        yield html.figure(_inline(tile) + _inline(around), words)


def _inline(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" width="{picture.width}" height="{picture.height}" src="data:image/jpeg;base64,{text}">'
