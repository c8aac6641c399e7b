"""sample_large: joint sampling of all levels of one picture, step by step, top to bottom.

Invariant: the bytes on the canvas depend on plan, conditions, seed and the predictions alone; not on who computed them,
in which order they arrived, or how often the run was interrupted. It does not know networks, Ray or file formats.
Source: ZoomLDM (CVPR 2025), joint multi-scale sampling; Large-Image-Diffusion (CVPR 2024) for overlapping tiles.

Notation: x_t noisy latents, x0 predicted clean latents, eps predicted noise; canvas rows are float32 (3, rows, width).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from engine.blend import RowAverager, smooth_weight, uniform_weight
from engine.canvas import BAND, Canvas
from engine.conditioning import extend_grid, tile_cells
from engine.config import GuidanceConfig
from engine.decode import clamped, decode_rows
from engine.guidance import CanvasGuidance, GuidePicture, halo_rows, steer_rows
from engine.magnification import LATENT_CHANNELS, LATENT_FACTOR, TILE_LATENT_PX, TILE_PX
from engine.noise import noise_rows
from engine.predict import DenoiseTiles, NewtonTarget, TileBatch, TilePrediction
from engine.schedule import Step
from engine.strips import BandReader, ReadRows, gather_tiles, in_bands
from engine.tiles import Level, Pass, Plan, Tiling
from engine.window import Surroundings

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
    begin: Callable[[Level], ReadRows] | None = None
    """Clean latents of a level that its first timestep is noised from; None begins with noise alone."""
    around: Surroundings | None = None
    """What a window of a finished picture lies in; the plan and the canvas are then the window's."""


def keyed_noise(seed: int) -> Noise:
    """Return the noise of a run: a pure function of its arguments."""
    return lambda stream, step, rows, width: noise_rows(seed, stream, step, rows, width)


def sample_large(s: Sampling) -> None:
    """Denoise the canvas to its last committed step, from wherever it was interrupted.

    Raises: CanvasError when the disk refuses or a chunk is damaged; ReplicaLostError when a batch cannot be evaluated.
    """
    cells_h, cells_w = s.plan.covered_cells
    s = replace(s, grid=extend_grid(s.grid, cells_h, cells_w))
    if s.canvas.fresh:
        _start(s)
    for index, pass_ in enumerate(s.plan.passes):
        if index < s.canvas.progress.pass_index:
            continue
        if index > s.canvas.progress.pass_index:
            _renoise(s, index, pass_)
        _run(s, index, pass_)


def _start(s: Sampling) -> None:
    """Begin with noise; where there are latents to begin from, with those, noised to the first timestep."""
    for level in s.plan.sampled:
        old = s.begin(level) if s.begin is not None else None
        for y0 in range(0, level.height, BAND):
            rows = (y0, min(y0 + BAND, level.height))
            noise = s.noise(f"start/{level.name}", 0, rows, level.width)
            x_t = noise if old is None else s.plan.passes[0].steps[0].renoise(old(*rows), noise)
            s.canvas.write(level.name, y0, x_t)
    s.canvas.commit(0, 0)


def _renoise(s: Sampling, index: int, pass_: Pass) -> None:
    """Noise the previous pass's result to this pass's first timestep."""
    for level, tiling in zip(s.plan.levels, pass_.tilings, strict=True):
        if tiling is None:
            continue
        for y0 in range(0, level.height, BAND):
            y1 = min(y0 + BAND, level.height)
            noise = s.noise(f"renoise/{level.name}", 0, (y0, y1), level.width)
            s.canvas.write(level.name, y0, pass_.steps[0].renoise(s.canvas.read(level.name, y0, y1), noise))
    s.canvas.commit(index, 0)


def _run(s: Sampling, index: int, pass_: Pass) -> None:
    """Do the steps of a pass that are left, each level from x_t to x_{t−}, coarse to fine.

    The denoiser sees one stream of batches: while it is busy with the last tiles of a step, it may be given the first
    ones of the next, as soon as the rows under them are written. Answers come in order, so that nothing is written for
    a step before the one before it is committed.
    """
    first, total = s.canvas.progress.steps, len(pass_.steps)
    work = [_level_steps(s, pass_, number) for number in range(first, total)]
    answers = s.denoiser.denoise(batch for levels in work for level in levels for batch in level.batches())
    s.watch.step(pass_.name, first, total)
    for number, levels in enumerate(work, first):
        for level in levels:
            level.run(answers)
        s.canvas.commit(index, number + 1)
        s.watch.step(pass_.name, number + 1, total)


def _level_steps(s: Sampling, pass_: Pass, number: int) -> list["LevelStep"]:
    """Return a step's work, coarse to fine; each level hangs on the one that steers it."""
    found: list[LevelStep] = []
    origin = (0, 0) if s.around is None else (s.around.window.box.y0, s.around.window.box.x0)
    guided = pass_.guided and s.guidance.covers(pass_.steps[number].t)
    for level, tiling in zip(s.plan.levels, pass_.tilings, strict=True):
        if tiling is not None:
            above, guide = (found[-1], None) if found else (None, s.guide)
            steers = guided and level is not s.plan.finest
            step = LevelStep(s, pass_, number, level, tiling, above if guided else None, steers)
            found.append(replace(step, guide=guide if guided else None, origin=origin))
    return found


def picture_of(s: Sampling, level: Level, x0: np.ndarray, key: str) -> np.ndarray:
    """Decode a coarse level's x0 (3, h, w) to its picture, float32 (3, 4h, 4w) clamped to [−1, 1]."""
    size, windows = (level.height, level.width), s.plan.decodes[s.plan.levels.index(level)]
    rows = decode_rows(lambda y0, y1: x0[:, y0:y1], size, windows, s.denoiser, s.decode_sigma, f"{key}/guide")
    return clamped(rows, level.height * LATENT_FACTOR, level.width * LATENT_FACTOR)


def predict_window(
    s: Sampling, pass_: Pass, number: int, level: Level, tiling: Tiling, origin: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yield the averaged x0 of a window of a level at a step, top to bottom, (3, n, w); steers and writes nothing.

    `level` has the window's size, the canvas its latents, `tiling` its tiles; all lie at `origin` of the whole level.
    """
    work = LevelStep(s, pass_, number, level, tiling, None, steers=False, origin=origin)
    return work.averaged(s.denoiser.denoise(work.batches()))


@dataclass(eq=False)
class LevelStep:
    """One step of one level: cuts its batches, and makes x_{t−} of their answers."""

    s: Sampling
    pass_: Pass
    number: int
    level: Level
    tiling: Tiling
    above: "LevelStep | None"
    """The same step of the level that steers this one."""
    steers: bool
    """Whether it steers a finer one."""
    x0: np.ndarray | None = None
    """float32 (3, h, w): what a finer level is to be steered by, from run() to picture()."""
    guide: GuidePicture | None = None
    """What steers this level, during run()."""
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
        """Write x_{t−} of the whole level, band by band, from the answers to its batches."""
        s, level = self.s, self.level
        if self.above is not None:
            self.guide = self.above.picture(level)
        read = BandReader(lambda y0, y1: s.canvas.read(level.name, y0, y1), level.height, BAND)
        kept = []
        steer = s.canvas_guidance if self.guide is not None else None
        halo = halo_rows(steer, self.guide) if steer is not None and self.guide is not None else 0
        for top, y0, y1, rows in in_bands(self._settled(answers, read), level.height, BAND, halo):
            predicted = rows[:LATENT_CHANNELS]
            x0 = predicted[:, y0 - top : y1 - top]
            moved = self._newton
            eps = rows[LATENT_CHANNELS:, y0 - top : y1 - top] if moved else self.step.eps_from_x0(read(y0, y1), x0)
            if steer is not None and self.guide is not None:
                # eps stays what was predicted: taken from the moved x0 it would undo most of the move in the update
                steered = steer_rows(steer, np.ascontiguousarray(predicted), (top, y0, y1), self.guide)
                x0 = steered if s.around is None else s.around.settle(y0, steered, x0)
            noise = s.noise(f"{self.pass_.name}/{level.name}", self.number, (y0, y1), level.width)
            s.canvas.write(level.name, y0, self.step.update(x0, eps, noise))
            if self.steers:
                kept.append(x0)
        self.x0 = np.concatenate(kept, axis=1) if self.steers else None
        self.guide = None

    def picture(self, finer: Level) -> GuidePicture:
        """Decode this level's x0 for the level it steers, and forget it."""
        assert self.x0 is not None  # levels run coarse to fine
        image = picture_of(self.s, self.level, self.x0, self.key)
        self.x0 = None
        return GuidePicture(image, self.level.factor // finer.factor)

    def _settled(self, answers: Iterator[TilePrediction], read: ReadRows) -> Iterator[np.ndarray]:
        """Yield averaged rows; in a window, tiles outside take part and predict what was there. `read` gives x_t."""
        y0, around = 0, self.s.around
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
        canvas, name = self.s.canvas, self.level.name

        def ahead() -> bool:
            """Whether the step before is not committed yet."""
            return canvas.progress.steps < self.number

        read = BandReader(lambda y0, y1: canvas.read(name, y0, y1, ahead()), self.level.height, BAND)
        top, left = self.origin
        for number, tiles in enumerate(self.tiling.batches()):
            rows = self.tiling.corner(tiles[0])[0], self.tiling.corner(tiles[-1])[0] + TILE_LATENT_PX
            while (ahead() and not canvas.written(name, *rows)) or (self._newton and self.guide is None):
                yield None
            padded = tiles + tiles[-1:] * (self.tiling.batch_size - len(tiles))
            corners = [self.tiling.corner(tile) for tile in padded]
            yield TileBatch(
                key=f"{self.key}/{number}",
                tiles=tiles,
                x_t=gather_tiles(read, self.tiling, tiles),
                timestep=self.step.t,
                alpha_bar=self.step.alpha_bar,
                cells=np.stack([tile_cells(self.s.grid, y + top, x + left, self.level.factor) for y, x in corners]),
                magnification=self.level.index,
                weight=self.pass_.weight,
                newton=self._target(corners),
            )

    def _target(self, corners: list[tuple[int, int]]) -> NewtonTarget | None:
        if self.guide is None or not self._newton:
            return None  # linear and probe steer in run()
        size = TILE_PX // self.guide.ratio
        squares = [self.guide.square(y * LATENT_FACTOR, x * LATENT_FACTOR, size) for y, x in corners]
        g = self.s.guidance
        return NewtonTarget(np.stack(squares), g.corrections, g.step, g.lr)
