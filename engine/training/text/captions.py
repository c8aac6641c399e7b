"""A table of captions and the SSL grids that its regions lie on.

Invariant: every row that is used lies wholly on its slide and covers whole cells; rows that do not are left out and
listed with their reason. It does not know text encoders or networks.

The table has the columns `slide,x,y,width,height,text`: the corner and size of a region in px, of the slide's
level 0 for a prepared set, of the base magnification for grids in files. engine.core.documents.tables says which forms
of tables are read.
"""

import glob
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.conditions.reference import read_embeddings
from engine.core.documents.tables import read_table
from engine.core.errors import EngineError
from engine.core.units import TILE_PX
from engine.datasets.dataset import PreparedSet

COLUMNS = ("slide", "x", "y", "width", "height", "text")
SHOWN = 5
"""Rows that a message names."""


@dataclass(frozen=True)
class Caption:
    """A sentence and the cells it describes."""

    slide: str
    y: int
    x: int
    height: int
    width: int
    """Cells."""
    text: str


@dataclass(frozen=True)
class LeftOut:
    """A row, or a bag, that cannot be learned from."""

    where: str
    """Line of the table, or bag."""
    reason: str


class CaptionedGrids:
    """Grids by slide and the captions of their regions."""

    def __init__(self, table: str, grids: str, encoder: str, ssl_dim: int, base_mpp: float) -> None:
        """Read a table, and the grids: a prepared set's folder, or a glob of files (D, h, w).

        Raises: EngineError when the table cannot be read, grids are of another encoder, or no row is left.
        """
        self._grids, per_cell = open_grids(grids, encoder, ssl_dim, base_mpp)
        self.captions, self.left_out = _read_table(Path(table), self._grids, per_cell)
        if not self.captions:
            said = "; ".join(f"{r.where}: {r.reason}" for r in self.left_out[:SHOWN])
            raise EngineError(f"{table} must describe regions of the grids in {grids}; no row does ({said}).")
        self.digest = digest_of("\n".join(repr(c) for c in self.captions).encode(), self._grids)

    def __len__(self) -> int:
        return len(self.captions)

    def grid(self, number: int) -> NDArray[np.float32]:
        """Return the SSL vectors that caption `number` describes: float32 (D, h, w)."""
        c = self.captions[number]
        return self._grids[c.slide][:, c.y : c.y + c.height, c.x : c.x + c.width].astype(np.float32)


def digest_of(told: bytes, grids: Mapping[str, NDArray[np.floating]]) -> str:
    """Return the SHA-256 (hex) of what tells regions and of all grids."""
    whole = (hashlib.sha256(np.ascontiguousarray(grid).tobytes()).digest() for _, grid in sorted(grids.items()))
    return hashlib.sha256(told + b"".join(whole)).hexdigest()


def open_grids(
    where: str, encoder: str, ssl_dim: int, base_mpp: float
) -> tuple[dict[str, NDArray[np.floating]], dict[str, tuple[float, float]]]:
    """Return grids (D, h, w) by slide, and how many px of the table a cell has on each axis (x, y)."""
    if Path(where).is_dir():
        prepared = PreparedSet(where)
        prepared.require(encoder=encoder, ssl_dim=ssl_dim, base_mpp=base_mpp)
        grids: dict[str, NDArray[np.floating]] = {}
        per_cell = {}
        for slide in prepared.slides:
            facts = prepared.slide_facts(slide)
            if facts.cells is not None:
                cells = np.load(Path(where) / "slides" / slide / "cells.npy", mmap_mode="r")
                grids[slide] = cells.transpose(2, 0, 1)
                per_cell[slide] = (TILE_PX * base_mpp / facts.mpp[0], TILE_PX * base_mpp / facts.mpp[1])
        if not grids:
            raise EngineError(f"{where} must have whole grids of its slides; an imported set has none. Prepare slides.")
        return grids, per_cell
    paths = sorted(glob.glob(where, recursive=True))
    if not paths:
        raise EngineError(f"{where} must name a prepared set or SSL grids, one file (D, h, w) per slide; none is.")
    if twice := [name for name, count in Counter(Path(path).stem for path in paths).items() if count > 1]:
        raise EngineError(f"grids in {where} must have different names; {twice[0]} comes twice. Rename one.")
    try:
        found = {Path(path).stem: read_embeddings(path) for path in paths}
    except ValueError as error:
        raise EngineError(str(error)) from error
    for slide, grid in found.items():
        if grid.shape[0] != ssl_dim:
            raise EngineError(
                f"the model's SSL vectors have {ssl_dim} channels; the grid of {slide} has {grid.shape[0]}: it comes "
                "from another encoder. Encode the region with the model's."
            )
    return dict(found), dict.fromkeys(found, (float(TILE_PX), float(TILE_PX)))


def _read_table(
    path: Path, grids: dict[str, NDArray[np.floating]], per_cell: dict[str, tuple[float, float]]
) -> tuple[list[Caption], list[LeftOut]]:
    table = read_table(path, [COLUMNS], "a table of captions", EngineError)
    if lacking := [name for name in COLUMNS if name not in table.names]:
        raise EngineError(
            f"{path} must have the columns {','.join(COLUMNS)}; it lacks {', '.join(lacking)} (it has "
            f"{', '.join(filter(None, table.names)) or 'none'})."
        )
    found, left_out = [], []
    for line, row in table.rows:
        caption, reason = _read_row(row, grids, per_cell)
        if caption is None:
            left_out.append(LeftOut(f"line {line}", reason))
        else:
            found.append(caption)
    return found, left_out


def _read_row(
    row: Mapping[str, str], grids: dict[str, NDArray[np.floating]], per_cell: dict[str, tuple[float, float]]
) -> tuple[Caption | None, str]:
    """Return a caption, or None and the reason."""
    slide, text = row["slide"], " ".join(row["text"].split())
    if slide not in grids:
        return None, f"there is no grid of slide {slide!r}"
    if not text:
        return None, "it has no text"
    try:
        sides = [float(row[name]) for name in ("x", "y", "width", "height")]
    except ValueError:
        sides = [np.nan]
    if not np.isfinite(sides).all():
        return None, "x, y, width and height must be numbers"
    x, y, width, height = sides
    cell_x, cell_y = per_cell[slide]
    # Whole cells inside the region: one that is half outside is not described.
    left, top = (int(np.ceil(v - 1e-6)) for v in (x / cell_x, y / cell_y))
    right, bottom = (int(np.floor(v + 1e-6)) for v in ((x + width) / cell_x, (y + height) / cell_y))
    _, rows, columns = grids[slide].shape
    if min(left, top) < 0 or right > columns or bottom > rows:
        return None, f"the region leaves the slide, {columns} x {rows} cells of {cell_x:g} px"
    if right <= left or bottom <= top:
        return None, f"the region covers no whole cell of {cell_x:g} x {cell_y:g} px"
    if not np.isfinite(grids[slide][:, top:bottom, left:right]).all():
        return None, "cells of the region were not encoded (no tissue)"
    return Caption(slide, top, left, bottom - top, right - left, text), ""
