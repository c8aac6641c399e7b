"""How much fine detail tissue has: gradients, dark px, energy by octave, and grids that no tissue has.

Invariant: sums over blocks, so that a canvas of any size is measured in bands and a set of crops one by one, with one
arithmetic. What is measured is a picture; it takes two to judge (`ratios`). It does not know sets or runs.

Octaves are Haar's: what a mean over b × b px loses against one over b/2 × b/2. Only blocks that are all tissue count,
so that the border of glass is no detail. A grid is what repeats at a fixed place modulo its pitch: tissue has none,
while latent px (4), guide px (16) and cells leave one.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.images.metrics import Picture

TISSUE_GREY, DARK_GREY = 215.0, 110.0
"""Mean grey (of R, G, B; 0..255) below which a px counts as tissue, and as dark: nuclei in H&E. Aerial pictures are
tissue but for white roofs and snow; 256 counts every px."""
OCTAVES = (2, 4, 8, 16)
"""Block sides in px; the first is the finest detail there is, periods of 2 to 4 px."""
PITCHES = (2, 4, 8, 16, 32, 64)
"""Periods in px a grid is looked for at."""
EDGE_PITCH = 16
"""Largest pitch blocks are flagged at: beyond, too few lines share a place to tell blocks from nuclei."""
_FOLD = max(PITCHES)
BAND_PX, BLOCK_PX = 512, 64
"""Rows of a canvas read at once, and measured at once (as floats); multiples of every octave."""
_WAYS = (
    ("too little (blur, loss)", "too much (noise, grid, compression)"),
    ("too little (nuclei lost or pale)", "too much (darker, or more nuclei)"),
)
LOW, HIGH = 0.9, 1 / 0.9
"""Ratios outside are flagged: too little detail, or too much, which noise and grids are."""
GRID_SHARE = 0.005
"""A grid is flagged from this share of the finest octaves' energy on; tissue has 0.0001 or less."""
EDGE_RATIO = 1.1
"""Blocking is flagged when the gradient at its edges, relative to all, is so many times the other picture's: JPEG at
quality 30 gives 1.5, a good one 1.2, of which a picture that was trained on it may keep some."""


@dataclass(frozen=True)
class Detail:
    """What tissue of a picture holds; None where there is too little tissue to say."""

    tissue_px: int
    """px that count, of those with mean grey below the threshold."""
    tissue_share: float
    gradient: float | None
    """Mean absolute difference of grey between neighbours that are both tissue, 0..255."""
    dark_share: float | None
    """Share of tissue px that are darker than DARK_GREY."""
    energy: dict[int, float | None]
    """Block side in px → mean squared Haar detail of that octave, grey²."""
    grid_share: dict[int, float | None]
    """Pitch in px → share of the finest octaves' energy that repeats with it, beyond chance."""
    edge_ratio: dict[int, float | None]
    """Pitch in px → the largest mean gradient at one place modulo it, relative to all: blocking, whatever its sign."""


@dataclass
class DetailSums:
    """Adds up blocks; `result` says what they come to."""

    tissue_grey: float = TISSUE_GREY
    px: int = 0
    tissue: int = 0
    dark: int = 0
    steps: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 2, _FOLD)))
    """(axis, sum and count, place modulo 64) of absolute differences between neighbours."""
    octaves: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(OCTAVES), 2)))
    """(octave, sum of squares and count)."""
    fold: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, _FOLD, _FOLD)))
    """(sum and count, y modulo 64, x modulo 64) of what the finest two octaves hold."""
    energy: float = 0.0
    """Sum of squares of the same."""

    def add(self, pixels: NDArray[np.uint8], y0: int = 0, x0: int = 0) -> None:
        """Add a block, uint8 (3, h, w), whose corner lies at (y0, x0) px of its picture."""
        grey = pixels.astype(np.float32).mean(axis=0)
        mask = grey < self.tissue_grey
        self.px += mask.size
        self.tissue += int(mask.sum())
        self.dark += int((grey < min(DARK_GREY, self.tissue_grey)).sum())
        self._add_steps(0, grey, mask, y0)
        self._add_steps(1, grey.T, mask.T, x0)
        self._add_octaves(grey, mask, y0, x0)

    def join(self, above: NDArray[np.uint8], below: NDArray[np.uint8], y: int) -> None:
        """Add the differences between two rows, uint8 (3, 1, w), that lie in different blocks; `y` is the lower's."""
        grey = np.concatenate([above, below], axis=1).astype(np.float32).mean(axis=0)
        self._add_steps(0, grey, grey < self.tissue_grey, y - 1)

    def join_columns(self, left: NDArray[np.uint8], right: NDArray[np.uint8], x: int) -> None:
        """Add the differences between two columns, uint8 (3, h, 1), of different blocks; `x` is the right one's."""
        grey = np.concatenate([left, right], axis=2).astype(np.float32).mean(axis=0).T
        self._add_steps(1, grey, grey < self.tissue_grey, x - 1)

    def packed(self) -> NDArray[np.float64]:
        """Return the sums as one vector; vectors add up as the sums do, so blocks may be measured anywhere."""
        counts = np.array([self.px, self.tissue, self.dark, self.energy], np.float64)
        return np.concatenate([counts, self.steps.ravel(), self.octaves.ravel(), self.fold.ravel()])

    @classmethod
    def unpacked(cls, packed: NDArray[np.float64], tissue_grey: float = TISSUE_GREY) -> "DetailSums":
        """Return the sums that a vector holds."""
        px, tissue, dark = (int(n) for n in packed[:3])
        found = cls(tissue_grey, px, tissue, dark, energy=float(packed[3]))
        at = 4
        for part in (found.steps, found.octaves, found.fold):
            part[...] = packed[at : at + part.size].reshape(part.shape)
            at += part.size
        return found

    def _add_steps(self, axis: int, grey: NDArray[np.float32], mask: NDArray[np.bool_], start: int) -> None:
        """Add differences from row to row; columns come transposed."""
        both = mask[1:] & mask[:-1]
        place = (start + 1 + np.arange(len(both))) % _FOLD
        for i, values in enumerate((np.abs(np.diff(grey, axis=0)) * both, both)):
            self.steps[axis, i] += np.bincount(place, values.sum(axis=1, dtype=np.float64), _FOLD)

    def _add_octaves(self, grey: NDArray[np.float32], mask: NDArray[np.bool_], y0: int, x0: int) -> None:
        # Blocks lie at multiples of their side in the picture, wherever it was cut.
        top, left = -y0 % max(OCTAVES), -x0 % max(OCTAVES)
        h, w = ((n - o) // max(OCTAVES) * max(OCTAVES) for n, o in zip(grey.shape, (top, left), strict=True))
        if h <= 0 or w <= 0:
            return
        level, whole = grey[top : top + h, left : left + w], mask[top : top + h, left : left + w]
        residual, first = None, whole
        for i, _ in enumerate(OCTAVES):
            coarse, inside = _halved(level), _all_of(whole)
            detail = (level - _doubled(coarse)) * _doubled(inside)
            self.octaves[i] += (float((detail.astype(np.float64) ** 2).sum()), 4.0 * inside.sum())
            if i == 0:
                residual, first = detail, _doubled(inside)
            elif i == 1:
                assert residual is not None  # the first octave made it
                self._add_fold(residual + _doubled(detail) * first, first, y0 + top, x0 + left)
            level, whole = coarse, inside

    def _add_fold(self, residual: NDArray[np.float32], mask: NDArray[np.bool_], y0: int, x0: int) -> None:
        for i, values in enumerate((residual, mask)):
            padded = np.pad(
                values, [(o % _FOLD, -(o + n) % _FOLD) for o, n in zip((y0, x0), values.shape, strict=True)]
            )
            h, w = (n // _FOLD for n in padded.shape)
            self.fold[i] += padded.reshape(h, _FOLD, w, _FOLD).sum(axis=(0, 2), dtype=np.float64)
        self.energy += float((residual.astype(np.float64) ** 2).sum())

    def result(self) -> Detail:
        """Return what the blocks come to."""
        count = float(self.steps[:, 1].sum())
        gradient = float(self.steps[:, 0].sum()) / count if count else None
        return Detail(
            tissue_px=self.tissue,
            tissue_share=self.tissue / self.px if self.px else 0.0,
            gradient=gradient,
            dark_share=self.dark / self.tissue if self.tissue else None,
            energy={b: float(s / n) if n else None for b, (s, n) in zip(OCTAVES, self.octaves, strict=True)},
            grid_share={p: self._grid_share(p) for p in PITCHES},
            edge_ratio={p: self._edge_ratio(p) for p in PITCHES},
        )

    def _grid_share(self, pitch: int) -> float | None:
        """Return the energy of the mean residual per place modulo `pitch`, over all energy, less what chance gives."""
        sums, counts = (_folded(part, pitch) for part in self.fold)
        total = counts.sum()
        if self.energy <= 0 or counts.min() < 1:
            return None
        explained = float((sums**2 / counts).sum()) / self.energy
        # Among p² places noise explains (p²)/N; residuals of one 4 px block are one draw, hence the 16.
        return max(0.0, explained - 16 * pitch**2 / float(total))

    def _edge_ratio(self, pitch: int) -> float | None:
        ratios = []
        for sums, counts in self.steps:
            s, n = (part.reshape(-1, pitch).sum(axis=0) for part in (sums, counts))
            if n.min() >= 1 and s.sum() > 0:
                ratios.append(float((s / n).max() / (s.sum() / n.sum())))
        return max(ratios, default=None)


def detail_of(picture: Picture, tissue_grey: float = TISSUE_GREY) -> Detail:
    """Measure a picture of any size in bands of rows; differences across bands count too."""
    sums, above = DetailSums(tissue_grey), None
    for top in range(0, picture.height, BAND_PX):
        band = picture.read(top, min(top + BAND_PX, picture.height))
        for first in range(0, band.shape[1], BLOCK_PX):
            rows = band[:, first : first + BLOCK_PX]
            sums.add(rows, top + first)
            if above is not None:
                sums.join(above, rows[:, :1], top + first)
            above = rows[:, -1:]
    return sums.result()


def ratios(of: Detail, relative_to: Detail) -> dict[str, float | None]:
    """Return gradient, dark share and energy of each octave, relative to another picture's; None without tissue."""
    found = {"gradient": _ratio(of.gradient, relative_to.gradient)}
    found["dark_share"] = _ratio(of.dark_share, relative_to.dark_share)
    return found | {f"energy_{b}px": _ratio(of.energy[b], relative_to.energy[b]) for b in OCTAVES}


def flags(of: Detail, relative_to: Detail) -> list[str]:
    """Say in words what is amiss: too little or too much detail, grids and blocks."""
    said = []
    for name, ratio in ratios(of, relative_to).items():
        limits = (LOW**2, HIGH**2) if name.startswith("energy") else (LOW, HIGH)  # energy is a square
        if ratio is not None and not limits[0] <= ratio <= limits[1]:
            said.append(f"{name} {ratio:.2f}: {_WAYS[name == 'dark_share'][ratio > 1]}")
    grids = {p: s for p, s in of.grid_share.items() if s is not None and s >= GRID_SHARE}
    if grids:
        pitch = max(grids, key=lambda p: grids[p])
        said.append(f"a grid of {pitch} px holds {grids[pitch]:.0%} of the finest detail")
    edges = {p: _ratio(v, relative_to.edge_ratio[p]) for p, v in of.edge_ratio.items() if p <= EDGE_PITCH}
    blocks = {p: r for p, r in edges.items() if r is not None and r >= EDGE_RATIO}
    if blocks:
        pitch = max(blocks, key=lambda p: blocks[p])
        said.append(f"blocks of {pitch} px: gradients at their edges {blocks[pitch]:.2f} times those expected")
    return said


def _ratio(value: float | None, base: float | None) -> float | None:
    if value is None or base is None:
        return None
    return value / base if base else (1.0 if not value else math.inf)


def _halved(level: NDArray[np.float32]) -> NDArray[np.float32]:
    h, w = level.shape
    return level.reshape(h // 2, 2, w // 2, 2).mean(axis=(1, 3))


def _all_of(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    h, w = mask.shape
    return np.logical_and.reduce(mask.reshape(h // 2, 2, w // 2, 2), axis=(1, 3))


def _doubled(level: NDArray) -> NDArray:
    return level.repeat(2, axis=0).repeat(2, axis=1)


def _folded(part: NDArray[np.float64], pitch: int) -> NDArray[np.float64]:
    n = _FOLD // pitch
    return part.reshape(n, pitch, n, pitch).sum(axis=(0, 2))
