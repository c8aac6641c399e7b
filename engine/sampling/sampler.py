"""sample_large: all levels of one picture, denoised together, step by step. The algorithm, from top to bottom.

    picture   sample_large      for every pass of the plan: begin it, then
    pass      _sample_pass      for every level of every step, coarse ones a step ahead: tiles out, answers in, commit
    step      LevelSampler.denoise    answers, averaged where tiles overlap, band by band
    band      LevelSampler._update    x0 steered by the coarser level, x_t → x_{t−}

Invariant: the bytes on the canvas depend on plan, conditions, seed and the predictions alone; not on who computed them,
in which order they arrived, or how often the run was interrupted. It does not know networks, Ray or file formats.
Source: ZoomLDM (CVPR 2025), joint multi-scale sampling; Large-Image-Diffusion (CVPR 2024) for overlapping tiles.

Notation: x_t noisy latents, x0 predicted clean latents, eps predicted noise; canvas rows are float32 (3, rows, width).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float32

from engine.canvas.canvas import BAND, Canvas
from engine.canvas.live_preview import LivePreviews
from engine.core.numerics import Noise
from engine.core.progress import ProgressCallback
from engine.core.streaming import BandReader, ForwardReader, ReadRows, Workers, in_bands
from engine.core.units import LATENT_CHANNELS, LATENT_FACTOR, TILE_LATENT_PX, TILE_PX
from engine.sampling.blend import RowAverager, smooth_weight, uniform_weight
from engine.sampling.config import GuidanceConfig
from engine.sampling.denoiser import DenoiseTiles, NewtonTarget, TileBatch, TilePrediction
from engine.sampling.guidance import CanvasGuidance, GuidePicture, halo_rows, steer_rows
from engine.sampling.pixels import clamped, decode_rows, enlarged_latents
from engine.sampling.plan import Level, Pass, Plan, Tiling, gather_tiles, x0_name
from engine.sampling.ssl_grid import TileVectors, extend_grid
from engine.sampling.surroundings import Surroundings


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
    """The coordinator's part of linear."""
    decode_sigma: float
    noise: Noise
    watch: ProgressCallback
    guide: GuidePicture | None = None
    """A picture that is there already, and steers the coarsest level that is sampled."""
    around: Surroundings | None = None
    """What a part of a finished picture lies in; the plan and the canvas are then the part's."""
    workers: Workers = field(default_factory=Workers)
    """Threads for the finest level's bands."""
    viewer: LivePreviews | None = None
    """Who is shown x0 after each step."""

    @cached_property
    def vectors(self) -> TileVectors:
        """The SSL vectors of tiles."""
        return TileVectors(self.grid)


def sample_large(s: Sampling) -> None:
    """Denoise the canvas to its last committed step, from wherever it was interrupted.

    Raises: CanvasError when the disk refuses or a chunk is damaged; ReplicaLostError when a batch cannot be evaluated.
    """
    cells_h, cells_w = s.plan.covered_cells
    s = replace(s, grid=extend_grid(s.grid, cells_h, cells_w))
    with s.workers:
        for index in range(s.canvas.progress.pass_index, len(s.plan.passes)):
            _sample_pass(s, index)


def _sample_pass(s: Sampling, index: int) -> None:
    """Do the steps of a pass that are left, each level from x_t to x_{t−}.

    The denoiser sees one stream of batches: while it is busy with the last tiles of a step, it may be given the first
    ones of the next, as soon as the rows under them are written. Answers come in order, so that nothing is written for
    a step before the one before it is committed.
    """
    pass_ = s.plan.passes[index]
    new = s.canvas.fresh or index > s.canvas.progress.pass_index
    guide = guide_of(s, pass_) if pass_.guided or (new and pass_.begins == "guide") else None
    if new:
        _begin(s, index, guide)
    first, total = s.canvas.progress.steps, len(pass_.steps)
    levels = _levels(s, pass_, first, guide)
    answers = s.denoiser.denoise(b for level, number in _staggered(levels, first, total) for b in level.batches(number))
    s.watch.step(pass_.name, first, total)
    if s.viewer is not None:
        s.viewer.committed(pass_.name, first - 1, total)
    for level, number in _staggered(levels, first, total):
        level.denoise(number, answers)
        if level is levels[-1]:
            s.workers.wait()
            for ahead in levels:  # coarse levels are written only now: they may be ahead of this step
                ahead.write(number)
            s.canvas.commit(index, number + 1)
            s.watch.step(pass_.name, number + 1, total)
            if s.viewer is not None:
                s.viewer.committed(pass_.name, number, total)


def _levels(s: Sampling, pass_: Pass, first: int, guide: GuidePicture | None) -> list["LevelSampler"]:
    """Return the levels of a pass, coarse to fine; each is steered by the one before, the first by `guide`."""
    found: list[LevelSampler] = []
    origin = (0, 0) if s.around is None else s.around.origin
    for level, tiling in zip(s.plan.levels, pass_.tilings, strict=True):
        if tiling is not None:
            above, given = (found[-1], None) if found else (None, guide)
            found.append(LevelSampler(s, pass_, first, level, tiling, origin, above, given))
    for level in found[:-1]:
        level.steers = True
    return found


def _staggered(levels: list["LevelSampler"], first: int, total: int) -> Iterator[tuple["LevelSampler", int]]:
    """Yield the levels of steps first..total in the order of work: each is one step ahead of the next finer one.

    A level depends on coarser ones alone. So the picture that steers it is decoded while finer levels are at work, and
    no replica waits for it.
    """
    for turn in range(first, total + len(levels) - 1):
        for behind, level in enumerate(levels):
            if first <= turn - behind < total:
                yield level, turn - behind


class LevelSampler:
    """One level through the steps of a pass: cuts its batches, and makes x_{t−} of their answers.

    The finest level is read from the canvas and written to it band by band. The others, a small part of it, are ahead
    of what is committed: what a step of theirs leaves stays in memory until that step is. Methods take the step's
    number in the pass.
    """

    def __init__(self, s: Sampling, pass_: Pass, first: int, level: Level, tiling: Tiling, origin: tuple[int, int],
                 above: "LevelSampler | None" = None, given: GuidePicture | None = None) -> None:  # fmt: skip
        """`origin` is where `level` lies in latent px when it is a part of one; its tiling is the part's."""
        self.s, self.pass_, self.first, self.level, self.tiling, self.origin = s, pass_, first, level, tiling, origin
        self.above, self.given = above, given
        self.steers = False
        """Whether it steers a finer level."""
        self._x_prev: dict[int, np.ndarray] = {}
        """Step → x_{t−} of a level that is ahead, float32 (3, h, w)."""
        self._x0: dict[int, np.ndarray] = {}
        """Step → the x0 that led there, where the solver's next step asks for it."""
        self._decoding: dict[int, Iterator[np.ndarray]] = {}
        """Step → rows of the picture for the level that this one steers."""
        self._guides: dict[int, GuidePicture] = {}
        """Step → the picture that steers this level, from its first use to the end of the step."""

    def denoise(self, number: int, answers: Iterator[TilePrediction]) -> None:
        """Make x_{t−} of the whole level, band by band, from the answers to its batches."""
        s, guide = self.s, self._guide(number)
        halo = halo_rows(s.canvas_guidance, guide) if s.canvas_guidance is not None and guide is not None else 0
        done: list[tuple[np.ndarray, np.ndarray]] = []
        for band in in_bands(self._beside_old(number, self.averaged(number, answers)), self.level.height, BAND, halo):
            if self.level is s.plan.finest:  # in a thread: bands do not know each other
                s.workers.do(partial(self._update_on_canvas, number, guide, *band))
            else:
                done.append(self._update(number, guide, *band))
        self._guides.pop(number, None)
        if done:
            x0, self._x_prev[number] = (np.concatenate(parts, axis=1) for parts in zip(*done, strict=True))
            if self.steers and self._guided(number):
                self._decoding[number] = _decode(s, self.level, x0, self._key(number))
            if self.pass_.keeps_x0:
                self._x0[number] = x0

    def _update(
        self, number: int, guide: GuidePicture | None, top: int, y0: int, y1: int, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return x0, steered, and x_{t−} of rows y0..y1, of which predictions from `top` on are known; no other is."""
        s, step = self.s, self.pass_.steps[number]
        predicted = rows[:LATENT_CHANNELS]
        x0 = predicted[:, y0 - top : y1 - top]
        if rows.shape[0] > LATENT_CHANNELS:  # newton's own
            eps = rows[LATENT_CHANNELS:, y0 - top : y1 - top]
        else:
            eps = step.eps_from_x0(self._x_t(number, y0, y1), x0)
        if s.canvas_guidance is not None and guide is not None:
            # eps stays what was predicted: taken from the moved x0 it would undo most of the move in the update
            steered = steer_rows(s.canvas_guidance, np.ascontiguousarray(predicted), (top, y0, y1), guide)
            x0 = steered if s.around is None else s.around.mix(y0, steered, x0)
        if s.viewer is not None:
            last = number == len(self.pass_.steps) - 1
            s.viewer.rows(self.level.name, (self.level.height, self.level.width), number, last, y0, x0)
        stream = f"{self.pass_.name}/{self.level.name}"
        noise = s.noise(stream, number, (y0, y1), self.level.width) if step.beta else None
        x_prev = step.update(x0, eps, noise, self._x0_before(number, y0, y1) if step.trend else None)
        return x0, x_prev

    def _update_on_canvas(self, number: int, guide: GuidePicture | None, top: int, y0: int, y1: int,
                          rows: np.ndarray) -> None:  # fmt: skip
        x0, x_prev = self._update(number, guide, top, y0, y1, rows)
        if self.pass_.keeps_x0:
            self.s.canvas.write(x0_name(self.level.name), y0, x0)
        self.s.canvas.write(self.level.name, y0, x_prev)

    def write(self, number: int) -> None:
        """Write x_{t−}, and x0 where the next step asks for it, if they are not on the canvas yet."""
        x_prev, x0 = self._x_prev.pop(number, None), self._x0.pop(number, None)
        for y0 in range(0, 0 if x_prev is None else self.level.height, BAND):
            if x0 is not None:
                self.s.canvas.write(x0_name(self.level.name), y0, x0[:, y0 : y0 + BAND])
            if x_prev is not None:
                self.s.canvas.write(self.level.name, y0, x_prev[:, y0 : y0 + BAND])

    def averaged(self, number: int, answers: Iterator[TilePrediction]) -> Iterator[np.ndarray]:
        """Yield finished rows of averaged x0, top to bottom: (3, n, w), or (6, n, w) with newton's eps below."""
        make_weight = smooth_weight if self.pass_.tile_weights == "smooth" else uniform_weight
        channels = LATENT_CHANNELS * (2 if self._newton(number) else 1)
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

    def _beside_old(self, number: int, averaged: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield averaged rows; in a part of a picture, tiles outside take part and predict what was there."""
        y0, around, step = 0, self.s.around, self.pass_.steps[number]
        read = BandReader(partial(self._x_t, number), self.level.height, BAND)
        for rows in averaged:
            if around is None:
                yield rows
                continue
            old = around.old(y0, y0 + rows.shape[1])
            if rows.shape[0] > LATENT_CHANNELS:
                old = np.concatenate([old, step.eps_from_x0(read(y0, y0 + rows.shape[1]), old)])
            yield around.mix(y0, rows, old)
            y0 += rows.shape[1]

    def batches(self, number: int) -> Iterator[TileBatch | None]:
        """Yield the batches, and None while what the next one shows is not there yet."""
        step, read = self.pass_.steps[number], BandReader(partial(self._x_t, number), self.level.height, BAND)
        top, left = self.origin
        for batch, tiles in enumerate(self.tiling.batches()):
            first, last = self.tiling.corner(tiles[0])[0], self.tiling.corner(tiles[-1])[0] + TILE_LATENT_PX
            while not self._ready(number, first, last):
                yield None
            padded = tiles + tiles[-1:] * (self.tiling.batch_size - len(tiles))
            corners = [self.tiling.corner(tile) for tile in padded]
            yield TileBatch(
                key=f"{self._key(number)}/{batch}",
                tiles=tiles,
                x_t=gather_tiles(read, self.tiling, tiles),
                timestep=step.t,
                alpha_bar=step.alpha_bar,
                cells=self.s.vectors.under([(y + top, x + left) for y, x in corners], self.level.factor),
                magnification=self.level.index,
                weight=self.pass_.weight_at(step.t),
                newton=self._newton_target(number, corners),
            )

    def _ready(self, number: int, y0: int, y1: int) -> bool:
        """Whether batches over rows y0..y1 can be cut: x_t is there, and with newton the picture that steers."""
        shown = self.above is None or number in self._guides or number in self.above._decoding
        if self._newton(number) and not shown:
            return False
        if number == self.first or not self._ahead(number):
            return True
        return number - 1 in self._x_prev or self.s.canvas.written(self.level.name, y0, y1)

    def _ahead(self, number: int) -> bool:
        """Whether the step before is not committed yet."""
        return self.s.canvas.progress.steps < number

    def _x_t(self, number: int, y0: int, y1: int) -> np.ndarray:
        """Return rows of x_t, of which the caller knows that they are there."""
        before = self._x_prev.get(number - 1)
        if before is not None:
            return before[:, y0:y1]
        return self.s.canvas.read(self.level.name, y0, y1, number > self.first and self._ahead(number))

    def _x0_before(self, number: int, y0: int, y1: int) -> np.ndarray:
        """Return rows of x0 of the step before, which is done: of a coarse level perhaps not committed."""
        before = self._x0.get(number - 1)
        return self.s.canvas.read(x0_name(self.level.name), y0, y1) if before is None else before[:, y0:y1]

    def _key(self, number: int) -> str:
        return f"{self.pass_.name}/t={self.pass_.steps[number].t}/{self.level.name}"

    def _guided(self, number: int) -> bool:
        return self.pass_.guided and self.s.guidance.covers(self.pass_.steps[number].t)

    def _newton(self, number: int) -> bool:
        steered = self.above is not None or self.given is not None
        return steered and self._guided(number) and self.s.guidance.method == "newton"

    def _guide(self, number: int) -> GuidePicture | None:
        """Return what steers this level at a step; the coarser level's picture is gathered at its first use."""
        if not self._guided(number) or (self.s.canvas_guidance is None and self.s.guidance.method != "newton"):
            return None
        if self.above is None:
            return self.given
        if number not in self._guides:
            image = _gathered(self.above._decoding.pop(number), self.above.level)
            self._guides[number] = GuidePicture(image, self.above.level.factor // self.level.factor)
        return self._guides[number]

    def _newton_target(self, number: int, corners: list[tuple[int, int]]) -> NewtonTarget | None:
        """Return what newton steers tiles to inside the replica; None where linear steers the rows of a band."""
        guide = self._guide(number) if self._newton(number) else None
        if guide is None:
            return None
        size = TILE_PX // guide.ratio
        squares = [guide.square(y * LATENT_FACTOR, x * LATENT_FACTOR, size) for y, x in corners]
        g = self.s.guidance
        return NewtonTarget(np.stack(squares), g.corrections, g.step, g.lr)


def guide_of(s: Sampling, pass_: Pass) -> GuidePicture | None:
    """Return the finished picture that steers the coarsest level of a pass; None when that has no coarser level."""
    number = pass_.coarsest
    if s.guide is not None and number <= int(s.plan.given):
        return s.guide
    if not number:
        return None
    level, ratio = s.plan.levels[number - 1], s.plan.levels[number - 1].factor // s.plan.levels[number].factor
    latents = s.canvas.read(level.name, 0, level.height)
    return GuidePicture(picture_of(s, level, latents, f"{pass_.name}/guide"), ratio)


def _begin(s: Sampling, index: int, guide: GuidePicture | None) -> None:
    """Write the first x_t of a pass's levels: noise, or clean latents noised to its first timestep."""
    pass_ = s.plan.passes[index]
    stream = "renoise" if pass_.begins == "latents" and index else "start"
    for level, tiling in zip(s.plan.levels, pass_.tilings, strict=True):
        if tiling is None:
            continue
        clean = _clean(s, index, level, tiling, guide)
        for y0 in range(0, level.height, BAND):
            y1 = min(y0 + BAND, level.height)
            x_t = s.noise(f"{stream}/{level.name}", 0, (y0, y1), level.width)
            if clean is not None:
                x_t = pass_.steps[0].renoise(clean(y0, y1), x_t)
            s.canvas.write(level.name, y0, x_t)
    s.canvas.commit(index, 0)


def _clean(s: Sampling, index: int, level: Level, tiling: Tiling, guide: GuidePicture | None) -> ReadRows | None:
    """Return the clean latents that a level begins from; None when it begins with noise alone."""
    pass_ = s.plan.passes[index]
    if pass_.begins == "noise":
        return None
    if pass_.begins == "latents":
        return s.around.old if s.canvas.fresh and s.around is not None else partial(s.canvas.read, level.name)
    assert guide is not None  # the plan says so only where there is a coarser level
    coarsest = s.plan.levels[pass_.coarsest]
    picture = replace(guide, ratio=guide.ratio * coarsest.factor // level.factor)
    size, key = (level.height, level.width), f"{pass_.name}/{level.name}/encode"
    return ForwardReader(enlarged_latents(picture, tiling, size, s.denoiser, key))


def picture_of(
    s: Sampling, level: Level, x0: Float32[np.ndarray, "3 h w"], key: str
) -> Float32[np.ndarray, "3 4*h 4*w"]:
    """Decode a coarse level's x0 (3, h, w) to its picture, float32 (3, 4h, 4w) clamped to [−1, 1]."""
    return _gathered(_decode(s, level, x0, key), level)


def _decode(s: Sampling, level: Level, x0: np.ndarray, key: str) -> Iterator[np.ndarray]:
    """Begin to decode a coarse level's x0; its rows come when they are asked for."""
    size, windows = (level.height, level.width), s.plan.decodes[s.plan.levels.index(level)]
    return decode_rows(lambda y0, y1: x0[:, y0:y1], size, windows, s.denoiser, s.decode_sigma, f"{key}/guide")


def _gathered(rows: Iterator[np.ndarray], level: Level) -> np.ndarray:
    return clamped(rows, level.height * LATENT_FACTOR, level.width * LATENT_FACTOR)


def predict_window(
    s: Sampling, pass_: Pass, number: int, level: Level, tiling: Tiling, origin: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yield the averaged x0 of a window of a level at a step, top to bottom, (3, n, w); steers and writes nothing.

    `level` has the window's size, the canvas its latents, `tiling` its tiles; all lie at `origin` of the whole level.
    """
    window = LevelSampler(s, pass_, number, level, tiling, origin)
    return window.averaged(number, s.denoiser.denoise(window.batches(number)))
