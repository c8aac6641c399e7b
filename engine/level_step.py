"""One step of one level: its batches, and x_{t−} of their answers; and what stays the same through a run.

Invariant: as sampler's. It does not know in which order levels and steps are worked on, nor what is committed when.

Notation: x_t noisy latents, x0 predicted clean latents, eps predicted noise; canvas rows are float32 (3, rows, width).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import numpy as np

from engine.blend import RowAverager, smooth_weight, uniform_weight
from engine.canvas import BAND, Canvas
from engine.conditioning import TileVectors
from engine.config import GuidanceConfig
from engine.decode import clamped, decode_rows
from engine.guidance import CanvasGuidance, GuidePicture, halo_rows, steer_rows
from engine.magnification import LATENT_CHANNELS, LATENT_FACTOR, TILE_LATENT_PX, TILE_PX
from engine.predict import DenoiseTiles, NewtonTarget, TileBatch, TilePrediction
from engine.schedule import Step
from engine.strips import BandReader, gather_tiles, in_bands
from engine.tiles import Level, Pass, Plan, Tiling, x0_name
from engine.window import Surroundings
from engine.workers import Workers

Noise = Callable[[str, int, tuple[int, int], int], np.ndarray]
"""(stream, step, (y0, y1), width) → standard normal float32 (3, y1−y0, width)."""


class Watch(Protocol):
    """Who looks on: a progress bar, a log, a clock."""

    def step(self, name: str, done: int, total: int) -> None:
        """Called when `done` of `total` steps of a pass are committed (0: the pass begins)."""

    def tiles(self, count: int) -> None:
        """Called when `count` more tiles are in."""


@dataclass(frozen=True)
class Sampling:
    """What stays the same through a run."""

    plan: Plan
    canvas: Canvas
    grid: np.ndarray
    """float32 (D, h, w): SSL vectors of the base cells under all levels."""
    denoiser: DenoiseTiles
    guidance: GuidanceConfig
    canvas_guidance: CanvasGuidance | None
    """The coordinator's part of linear and probe."""
    decode_sigma: float
    noise: Noise
    watch: Watch
    guide: GuidePicture | None = None
    """A picture that is there already, and steers the coarsest level that is sampled."""
    around: Surroundings | None = None
    """What a window of a finished picture lies in; the plan and the canvas are then the window's."""
    workers: Workers = field(default_factory=Workers)
    """Threads for the finest level's bands."""

    @cached_property
    def vectors(self) -> TileVectors:
        """The SSL vectors of tiles."""
        return TileVectors(self.grid)


def picture_of(s: Sampling, level: Level, x0: np.ndarray, key: str) -> np.ndarray:
    """Decode a coarse level's x0 (3, h, w) to its picture, float32 (3, 4h, 4w) clamped to [−1, 1]."""
    return _gathered(_decoding(s, level, x0, key), level)


def _decoding(s: Sampling, level: Level, x0: np.ndarray, key: str) -> Iterator[np.ndarray]:
    """Begin to decode a coarse level's x0; its rows come when they are asked for."""
    size, windows = (level.height, level.width), s.plan.decodes[s.plan.levels.index(level)]
    return decode_rows(lambda y0, y1: x0[:, y0:y1], size, windows, s.denoiser, s.decode_sigma, f"{key}/guide")


def _gathered(rows: Iterator[np.ndarray], level: Level) -> np.ndarray:
    return clamped(rows, level.height * LATENT_FACTOR, level.width * LATENT_FACTOR)


@dataclass(eq=False)
class LevelStep:
    """One step of one level: cuts its batches, and makes x_{t−} of their answers.

    The finest level is read from the canvas and written to it band by band. The others, a small part of it, are ahead
    of what is committed: they stay in memory until their step is.
    """

    s: Sampling
    pass_: Pass
    number: int
    level: Level
    tiling: Tiling
    above: "LevelStep | None"
    """The same step of the level that steers this one."""
    steers: bool
    """Whether it steers a finer one."""
    before: "LevelStep | None" = None
    """The step before of the same level; None: x_t is what is committed."""
    after: np.ndarray | None = None
    """float32 (3, h, w): x_{t−} of a level that is not the finest, from run() to write()."""
    x0: np.ndarray | None = None
    """float32 (3, h, w): the x0 that led there, from run() until the next step is committed; only if that asks."""
    shown: Iterator[np.ndarray] | None = None
    """The picture's rows for the level that it steers, which are being decoded, from run() to picture()."""
    guide: GuidePicture | None = None
    """What steers this level, until run() is over."""
    origin: tuple[int, int] = (0, 0)
    """Where `level` lies in latent px when it is a window of a level; its tiling is the window's."""

    @property
    def step(self) -> Step:
        return self.pass_.steps[self.number]

    @property
    def key(self) -> str:
        return f"{self.pass_.name}/t={self.step.t}/{self.level.name}"

    @property
    def _newton(self) -> bool:
        return (self.above is not None or self.guide is not None) and self.s.guidance.method == "newton"

    def run(self, answers: Iterator[TilePrediction]) -> None:
        """Make x_{t−} of the whole level, band by band, from the answers to its batches."""
        s, level = self.s, self.level
        steer = s.canvas_guidance
        if self.above is not None and steer is not None:
            self.guide = self.above.picture(level)
        halo = halo_rows(steer, self.guide) if steer is not None and self.guide is not None else 0
        kept = []
        for band in in_bands(self._settled(answers), level.height, BAND, halo):
            if level is s.plan.finest:
                s.workers.do(partial(self._write_band, *band, self.guide))
            else:
                kept.append(self._update(*band, self.guide))
        if kept:
            x0, self.after = (np.concatenate(parts, axis=1) for parts in zip(*kept, strict=True))
            self.shown = _decoding(s, level, x0, self.key) if self.steers else None
            self.x0 = x0 if self.pass_.keeps_x0 else None
        self.guide = None

    def _update(
        self, top: int, y0: int, y1: int, rows: np.ndarray, guide: GuidePicture | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return x0, steered, and x_{t−} of rows y0..y1, of which predictions from `top` on are known; no other is."""
        s, steer = self.s, self.s.canvas_guidance
        predicted = rows[:LATENT_CHANNELS]
        x0 = predicted[:, y0 - top : y1 - top]
        if rows.shape[0] > LATENT_CHANNELS:  # newton's own
            eps = rows[LATENT_CHANNELS:, y0 - top : y1 - top]
        else:
            eps = self.step.eps_from_x0(self._x_t(y0, y1), x0)
        if steer is not None and guide is not None:
            # eps stays what was predicted: taken from the moved x0 it would undo most of the move in the update
            steered = steer_rows(steer, np.ascontiguousarray(predicted), (top, y0, y1), guide)
            x0 = steered if s.around is None else s.around.settle(y0, steered, x0)
        noise = None
        if self.step.beta:
            noise = s.noise(f"{self.pass_.name}/{self.level.name}", self.number, (y0, y1), self.level.width)
        return x0, self.step.update(x0, eps, noise, self._x0_before(y0, y1) if self.step.trend else None)

    def _write_band(self, top: int, y0: int, y1: int, rows: np.ndarray, guide: GuidePicture | None) -> None:
        """Update a band of the finest level in a thread: bands do not know each other."""
        x0, after = self._update(top, y0, y1, rows, guide)
        if self.pass_.keeps_x0:
            self.s.canvas.write(x0_name(self.level.name), y0, x0)
        self.s.canvas.write(self.level.name, y0, after)

    def write(self) -> None:
        """Write x_{t−} to the canvas, if it is not there yet, and x0 where the next step asks for it."""
        if self.after is None:
            return
        for y0 in range(0, self.level.height, BAND):
            if self.x0 is not None:
                self.s.canvas.write(x0_name(self.level.name), y0, self.x0[:, y0 : y0 + BAND])
            self.s.canvas.write(self.level.name, y0, self.after[:, y0 : y0 + BAND])
        self.after = self.x0 = None

    def picture(self, finer: Level) -> GuidePicture:
        """Return this level's picture for the level it steers, when it is decoded, and forget it."""
        assert self.shown is not None  # levels run coarse to fine
        image, self.shown = _gathered(self.shown, self.level), None
        return GuidePicture(image, self.level.factor // finer.factor)

    def _settled(self, answers: Iterator[TilePrediction]) -> Iterator[np.ndarray]:
        """Yield averaged rows; in a window, tiles outside take part and predict what was there."""
        y0, around = 0, self.s.around
        read = BandReader(self._x_t, self.level.height, BAND)
        for rows in self.averaged(answers):
            if around is None:
                yield rows
                continue
            old = around.old(y0, y0 + rows.shape[1])
            if rows.shape[0] > LATENT_CHANNELS:
                old = np.concatenate([old, self.step.eps_from_x0(read(y0, y0 + rows.shape[1]), old)])
            yield around.settle(y0, rows, old)
            y0 += rows.shape[1]

    def averaged(self, answers: Iterator[TilePrediction]) -> Iterator[np.ndarray]:
        """Yield finished rows of averaged x0, top to bottom: (3, n, w), or (6, n, w) with newton's eps below."""
        make_weight = smooth_weight if self.pass_.tile_weights == "smooth" else uniform_weight
        channels = LATENT_CHANNELS * (2 if self._newton else 1)
        averager = RowAverager(channels, self.level.width, make_weight(TILE_LATENT_PX))
        for tiles in self.tiling.batches():
            answer = next(answers)
            values = answer.x0 if answer.eps is None else np.concatenate([answer.x0, answer.eps], axis=1)
            for tile, value in zip(tiles, values, strict=False):
                averager.add(*self.tiling.corner(tile), value)
                rows = averager.pop(self.tiling.finished_rows(tile, self.level.height))
                if rows.shape[1]:
                    yield rows
            self.s.watch.tiles(len(tiles))

    def batches(self) -> Iterator[TileBatch | None]:
        """Yield the batches, and None while what the next one shows is not there yet."""
        read = BandReader(self._x_t, self.level.height, BAND)
        top, left = self.origin
        for number, tiles in enumerate(self.tiling.batches()):
            while not self._ready(self.tiling.corner(tiles[0])[0], self.tiling.corner(tiles[-1])[0] + TILE_LATENT_PX):
                yield None
            if self._newton and self.guide is None and self.above is not None:
                self.guide = self.above.picture(self.level)
            padded = tiles + tiles[-1:] * (self.tiling.batch_size - len(tiles))
            corners = [self.tiling.corner(tile) for tile in padded]
            yield TileBatch(
                key=f"{self.key}/{number}",
                tiles=tiles,
                x_t=gather_tiles(read, self.tiling, tiles),
                timestep=self.step.t,
                alpha_bar=self.step.alpha_bar,
                cells=self.s.vectors.under([(y + top, x + left) for y, x in corners], self.level.factor),
                magnification=self.level.index,
                weight=self.pass_.weight_at(self.step.t),
                newton=self._target(corners),
            )

    def _ready(self, y0: int, y1: int) -> bool:
        """Whether batches over rows y0..y1 can be cut: x_t is there, and with newton the picture that steers."""
        if self._newton and self.guide is None and self.above is not None and self.above.shown is None:
            return False
        if self.before is None or not self._ahead:
            return True
        return self.before.after is not None or self.s.canvas.written(self.level.name, y0, y1)

    @property
    def _ahead(self) -> bool:
        """Whether the step before is not committed yet."""
        return self.s.canvas.progress.steps < self.number

    def _x_t(self, y0: int, y1: int) -> np.ndarray:
        """Return rows of x_t, of which the caller knows that they are there."""
        if self.before is not None and self.before.after is not None:
            return self.before.after[:, y0:y1]
        return self.s.canvas.read(self.level.name, y0, y1, self.before is not None and self._ahead)

    def _x0_before(self, y0: int, y1: int) -> np.ndarray:
        """Return rows of x0 of the step before, which is done: of a coarse level perhaps not committed."""
        if self.before is not None and self.before.x0 is not None:
            return self.before.x0[:, y0:y1]
        return self.s.canvas.read(x0_name(self.level.name), y0, y1)

    def _target(self, corners: list[tuple[int, int]]) -> NewtonTarget | None:
        if self.guide is None or not self._newton:
            return None  # linear and probe steer in run()
        size = TILE_PX // self.guide.ratio
        squares = [self.guide.square(y * LATENT_FACTOR, x * LATENT_FACTOR, size) for y, x in corners]
        g = self.s.guidance
        return NewtonTarget(np.stack(squares), g.corrections, g.step, g.lr)
