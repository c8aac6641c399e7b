"""The plan of a run: levels, passes, tiles and batches. Sizes only, no pixels, no weights.

Invariant: the tiles of a tiling cover every latent px, in row-major order; batches are fixed by the plan alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float32

from engine.core.streaming import Box, ReadRows
from engine.core.units import LATENT_FACTOR, TILE_LATENT_PX, TILE_PX, MagnificationScale
from engine.sampling.config import CanvasConfig, RunConfig, TileWeights
from engine.sampling.schedule import TRAIN_STEPS, Step, steps

NEAR, FROM_NEAR, FROM_FAR = 4, 600, 700
"""Timestep at which levels begin from their guide unless another is asked for: FROM_NEAR where none is more than NEAR
times as fine as the one it begins from. Later, the guide's blur stays, the more of it, the coarser the guide; earlier,
what it shows is lost (docs/results/guidance.md)."""
MAX_STEP = 16
"""Largest factor between a level and the one that steers it; a tile then lies under 16×16 px of its guide."""


@dataclass(frozen=True)
class Level:
    """A canvas at one magnification; sizes in latent px."""

    name: str
    factor: int
    """Base px per px of this level, on each axis."""
    index: int
    """The model's magnification index."""
    height: int
    width: int


@dataclass(frozen=True)
class Tiling:
    """Square tiles of 64 latent px at the crossings of `ys` and `xs`, cut into batches row by row."""

    ys: tuple[int, ...]
    xs: tuple[int, ...]
    batch_size: int

    def __len__(self) -> int:
        return len(self.ys) * len(self.xs)

    def corner(self, tile: int) -> tuple[int, int]:
        """Return the (y, x) of a tile's top-left in latent px."""
        return self.ys[tile // len(self.xs)], self.xs[tile % len(self.xs)]

    def batches(self) -> Iterator[tuple[int, ...]]:
        """Yield the tile numbers of each batch; only the last may be short."""
        for start in range(0, len(self), self.batch_size):
            yield tuple(range(start, min(start + self.batch_size, len(self))))

    @property
    def batch_count(self) -> int:
        return -(-len(self) // self.batch_size)

    def finished_rows(self, tile: int, height: int) -> int:
        """Return how many top rows no later tile touches once `tile` is in."""
        row, column = divmod(tile, len(self.xs))
        if column + 1 < len(self.xs):
            return self.ys[row]
        return self.ys[row + 1] if row + 1 < len(self.ys) else height


def touching(tiling: Tiling, box: Box) -> tuple[Tiling, Box]:
    """Return the tiles that touch a box (latent px), as a tiling of the box they fill, and that box."""
    ys = [y for y in tiling.ys if y < box.y1 and y + TILE_LATENT_PX > box.y0]
    xs = [x for x in tiling.xs if x < box.x1 and x + TILE_LATENT_PX > box.x0]
    filled = Box(ys[0], xs[0], ys[-1] + TILE_LATENT_PX, xs[-1] + TILE_LATENT_PX)
    return Tiling(tuple(y - ys[0] for y in ys), tuple(x - xs[0] for x in xs), tiling.batch_size), filled


Beginning = Literal["noise", "latents", "guide"]
"""What the first x_t of a pass is made of: noise alone; the latents of the pass before, noised; or the picture of the
next coarser level, enlarged, encoded and noised."""


@dataclass(frozen=True)
class Pass:
    """A run over timesteps with one tiling per level; None leaves a level alone."""

    name: str
    steps: tuple[Step, ...]
    tilings: tuple[Tiling | None, ...]
    tile_weights: TileWeights
    weight: float
    """Classifier-free guidance w."""
    guided: bool
    """Whether coarser levels steer finer ones."""
    begins: Beginning
    weighted: tuple[int, int] = (TRAIN_STEPS, 1)
    """First and last timestep with that w; at others it is 0."""

    def weight_at(self, t: int) -> float:
        """Return w at a timestep."""
        first, last = self.weighted
        return self.weight if first >= t >= last else 0.0

    @property
    def keeps_x0(self) -> bool:
        """Whether the solver asks for the x0 of a step in the next one."""
        return any(step.trend for step in self.steps)

    @property
    def coarsest(self) -> int:
        """The number of the coarsest level it samples."""
        return next(number for number, tiling in enumerate(self.tilings) if tiling is not None)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first pixel."""

    levels: tuple[Level, ...]
    passes: tuple[Pass, ...]
    decodes: tuple[Tiling, ...]
    """Per level, the windows it is decoded in."""
    size_px: tuple[int, int]
    """(height, width) of the picture; what the last latent row and column show beyond it is cut off."""
    given: bool = False
    """Whether the coarsest level is a picture that a user gives: it steers, and is not sampled."""

    @property
    def finest(self) -> Level:
        return self.levels[-1]

    @property
    def sampled(self) -> tuple[Level, ...]:
        """The levels that are sampled, coarse to fine."""
        return self.levels[self.given :]

    @property
    def arrays(self) -> dict[str, tuple[int, int]]:
        """The arrays of the canvas, name → (h, w) in latent px: x_t of each sampled level and, where the solver is of
        second order x0 of its last step."""
        sizes = {level.name: (level.height, level.width) for level in self.sampled}
        for pass_ in self.passes:
            if pass_.keeps_x0:
                done = [level for level, tiling in zip(self.levels, pass_.tilings, strict=True) if tiling is not None]
                sizes |= {x0_name(level.name): (level.height, level.width) for level in done}
        return sizes

    @property
    def decode(self) -> Tiling:
        """The windows of the picture itself."""
        return self.decodes[-1]

    @property
    def finest_pass(self) -> Pass:
        """The pass that samples the finest level first; its tiles are the picture's."""
        return next(p for p in self.passes if p.tilings[-1] is not None)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Base cells under the canvas: (h, w)."""
        return -(-self.finest.height // TILE_LATENT_PX), -(-self.finest.width // TILE_LATENT_PX)

    @property
    def covered_cells(self) -> tuple[int, int]:
        """Base cells under the largest level, which may see past the canvas: (h, w)."""
        spans = [(n.height * n.factor, n.width * n.factor) for n in self.levels]
        return tuple(-(-max(s[i] for s in spans) // TILE_LATENT_PX) for i in (0, 1))  # type: ignore[return-value]


def x0_name(level: str) -> str:
    """Return the name of the array that holds x0 of a level's last step."""
    return f"{level}.x0"


def axis_positions(size: int, stride: int, tile: int = TILE_LATENT_PX) -> tuple[int, ...]:
    """Return tile starts along one axis; the last tile is shifted inward so that none leaves the canvas.

    Raises: ValueError when the axis is shorter than a tile.
    """
    if size < tile:
        raise ValueError(f"a level must be at least one tile ({tile} latent px) on each axis; got {size}.")
    inner = range(0, size - tile, stride)
    return (*inner, size - tile)


def make_tiling(height: int, width: int, stride: int, batch_size: int) -> Tiling:
    """Return the tiling of a level; sizes in latent px. A batch holds `batch_size` tiles, or all if there are fewer."""
    ys, xs = axis_positions(height, stride), axis_positions(width, stride)
    return Tiling(ys, xs, min(batch_size, len(ys) * len(xs)))


def pick_levels(canvas: CanvasConfig, scale: MagnificationScale) -> tuple[str, ...]:
    """Return the magnifications of a run, coarse to fine: those asked for, or a cascade.

    The cascade ends at the finest magnification whose one tile sees the whole canvas (else at the coarsest the model
    knows) and gets there in the widest steps of a factor of at most 16: coarser levels between cost less.
    Raises: ValueError when the levels asked for do not run from coarse to the base in such steps.
    """
    if canvas.levels is not None:
        factors = [scale.factor(name) for name in canvas.levels]
        if not factors or factors[-1] != 1 or any(not 1 < a / b <= MAX_STEP for a, b in pairwise(factors)):
            raise ValueError(
                f"canvas.levels must run from coarse to fine in steps of a factor of at most {MAX_STEP} and end at the "
                f"base {scale.base}; got {list(canvas.levels)}. Leave it out to have the levels picked."
            )
        return canvas.levels
    wanted = max(canvas.height, canvas.width) / TILE_PX
    found = [scale.base]
    while scale.factor(found[0]) < wanted:
        here = scale.factor(found[0])
        reach = [name for name in scale.names if here < scale.factor(name) <= here * MAX_STEP]
        if not reach:
            break
        enough = [name for name in reach if scale.factor(name) >= wanted]
        found.insert(0, enough[0] if enough else reach[-1])
    return tuple(found)


def make_levels(canvas: CanvasConfig, scale: MagnificationScale) -> tuple[Level, ...]:
    """Return the levels; a coarse one covers the canvas with whole tiles at least."""
    found: list[Level] = []
    for name in pick_levels(canvas, scale):
        factor = scale.factor(name)
        height, width = (
            max(-(-size // (LATENT_FACTOR * factor)), TILE_LATENT_PX) for size in (canvas.height, canvas.width)
        )
        found.append(Level(name, factor, scale.index(name), height, width))
    return tuple(found)


def make_plan(config: RunConfig, scale: MagnificationScale) -> Plan:
    """Cut a run into levels, passes, tiles and batches.

    Raises: ValueError when the canvas is to begin from a guide and has none.
    """
    levels = make_levels(config.canvas, scale)
    d, given = config.decode, config.guide is not None
    first = from_guide(config, levels)
    passes = _cascade(config, levels, first, given) if first else [_joint(config, levels, given)]
    passes += [_refine(config, levels[-1], len(levels))] if config.refine.start else []
    decodes = tuple(make_tiling(n.height, n.width, d.tile_stride, d.batch_size) for n in levels)
    return Plan(levels, tuple(passes), decodes, (config.canvas.height, config.canvas.width), given)


def from_guide(config: RunConfig, levels: tuple[Level, ...]) -> int:
    """Return the timestep at which finer levels begin from their guide; 0 when all levels are sampled jointly.

    Raises: ValueError when one is asked for and there is no coarser level.
    """
    asked = config.sampling.from_guide
    if asked and len(levels) == 1:
        raise ValueError(
            f"sampling.from_guide={asked} needs a guide, a coarser level to begin from; this canvas has "
            f"{levels[0].name} alone. Name a coarser one first in canvas.levels, or set sampling.from_guide=0."
        )
    if asked is not None:
        return asked
    if len(levels) == 1 or config.guide is not None:
        return 0
    widest = max(coarse.factor // fine.factor for coarse, fine in pairwise(levels))
    return FROM_NEAR if widest <= NEAR else FROM_FAR


def _joint(config: RunConfig, levels: tuple[Level, ...], given: bool) -> Pass:
    """Return the pass over all levels side by side, in the published order; a given level is not sampled."""
    begins: Beginning = "guide" if given and config.sampling.start < TRAIN_STEPS else "noise"
    tilings = [None if given and not i else _tiling(config, level) for i, level in enumerate(levels)]
    return _pass(config, "joint", config.sampling.start, tilings, begins, guided=len(levels) > 1)


def _cascade(config: RunConfig, levels: tuple[Level, ...], first: int, given: bool) -> list[Pass]:
    """Return one pass per level, coarse to fine: each but the coarsest begins from the one before, at `first`."""
    found: list[Pass] = []
    for i, level in enumerate(levels[given:], int(given)):
        tilings = [_tiling(config, level) if n == i else None for n in range(len(levels))]
        start, begins = (first, "guide") if i else (config.sampling.start, "noise")
        found.append(_pass(config, level.name, start, tilings, begins, guided=i > 0))
    return found


def _tiling(config: RunConfig, level: Level) -> Tiling:
    return make_tiling(level.height, level.width, config.sampling.tile_stride, config.sampling.batch_size)


def _pass(
    config: RunConfig, name: str, start: int, tilings: list[Tiling | None], begins: Beginning, *, guided: bool
) -> Pass:
    s = config.sampling
    return Pass(
        name,
        steps(start, min(s.stride, start), s.last_step_clean, s.solver),
        tuple(tilings),
        s.tile_weights,
        s.weight,
        guided=guided and config.guidance.method != "none",
        begins=begins,
        weighted=(s.weight_from, s.weight_to),
    )


def _refine(config: RunConfig, finest: Level, levels: int) -> Pass:
    r = config.refine
    tiling = make_tiling(finest.height, finest.width, r.tile_stride, config.sampling.batch_size)
    tilings = (*[None] * (levels - 1), tiling)
    return Pass("refine", steps(r.start, r.stride), tilings, r.tile_weights, r.weight, guided=False, begins="latents")


def gather_tiles(read: ReadRows, tiling: Tiling, tiles: tuple[int, ...]) -> Float32[np.ndarray, "b 3 64 64"]:
    """Return the windows of a batch, the last one repeated up to the batch size: float32 (B, 3, 64, 64).

    A short batch is padded because another shape would take other kernels and change the last bits.
    """
    found: list[np.ndarray] = []
    for tile in tiles:
        y, x = tiling.corner(tile)
        found.append(read(y, y + TILE_LATENT_PX)[:, :, x : x + TILE_LATENT_PX])
    return np.stack(found + found[-1:] * (tiling.batch_size - len(found)))
