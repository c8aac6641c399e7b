"""sample_large: joint sampling of all levels of one picture, step by step, top to bottom.

Invariant: the bytes on the canvas depend on plan, conditions, seed and the predictions alone; not on who computed them,
in which order they arrived, or how often the run was interrupted. It does not know networks, Ray or file formats.
Source: ZoomLDM (CVPR 2025), joint multi-scale sampling; Large-Image-Diffusion (CVPR 2024) for overlapping tiles.

Notation: x_t noisy latents, x0 predicted clean latents, eps predicted noise; canvas rows are float32 (3, rows, width).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np

from engine.canvas import BAND
from engine.conditioning import extend_grid
from engine.enlarged import enlarged_latents
from engine.guidance import GuidePicture
from engine.level_step import LevelStep, Noise, Sampling, Watch, picture_of
from engine.noise import noise_rows
from engine.strips import ForwardReader, ReadRows
from engine.tiles import Level, Pass, Tiling

__all__ = ["Noise", "Sampling", "Watch", "keyed_noise", "picture_of", "predict_window", "sample_large"]


def keyed_noise(seed: int) -> Noise:
    """Return the noise of a run: a pure function of its arguments."""
    return lambda stream, step, rows, width: noise_rows(seed, stream, step, rows, width)


def sample_large(s: Sampling) -> None:
    """Denoise the canvas to its last committed step, from wherever it was interrupted.

    Raises: CanvasError when the disk refuses or a chunk is damaged; ReplicaLostError when a batch cannot be evaluated.
    """
    cells_h, cells_w = s.plan.covered_cells
    s = replace(s, grid=extend_grid(s.grid, cells_h, cells_w))
    with s.workers:
        for index, pass_ in enumerate(s.plan.passes):
            if index < s.canvas.progress.pass_index:
                continue
            new = s.canvas.fresh or index > s.canvas.progress.pass_index
            guide = guide_of(s, pass_) if pass_.guided or (new and pass_.begins == "guide") else None
            if new:
                _begin(s, index, guide)
            _run(s, index, guide)


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


def _run(s: Sampling, index: int, guide: GuidePicture | None) -> None:
    """Do the steps of a pass that are left, each level from x_t to x_{t−}.

    The denoiser sees one stream of batches: while it is busy with the last tiles of a step, it may be given the first
    ones of the next, as soon as the rows under them are written. Answers come in order, so that nothing is written for
    a step before the one before it is committed.
    """
    pass_, first = s.plan.passes[index], s.canvas.progress.steps
    total = len(pass_.steps)
    steps = [_level_steps(s, pass_, number, guide) for number in range(first, total)]
    for earlier, later in pairwise(steps):
        for before, level in zip(earlier, later, strict=True):
            level.before = before
    answers = s.denoiser.denoise(batch for level in _staggered(steps) for batch in level.batches())
    s.watch.step(pass_.name, first, total)
    for level in _staggered(steps):
        level.run(answers)
        if level is steps[level.number - first][-1]:
            _commit(s, index, steps[level.number - first])
            s.watch.step(pass_.name, level.number + 1, total)


def _staggered(steps: list[list["LevelStep"]]) -> Iterator["LevelStep"]:
    """Yield the levels of all steps in the order of work: each is one step ahead of the next finer one.

    A level depends on coarser ones alone. So the picture that steers it is decoded while finer levels are at work, and
    no replica waits for it.
    """
    depth = len(steps[0]) if steps else 0
    for turn in range(len(steps) + depth - 1):
        for behind in range(depth):
            if 0 <= turn - behind < len(steps):
                yield steps[turn - behind][behind]


def _commit(s: Sampling, index: int, levels: list["LevelStep"]) -> None:
    """Publish a step: its levels are written, the coarse ones only now, for they are ahead of it."""
    s.workers.wait()
    for level in levels:
        level.write()
    s.canvas.commit(index, levels[-1].number + 1)


def _level_steps(s: Sampling, pass_: Pass, number: int, guide: GuidePicture | None) -> list["LevelStep"]:
    """Return a step's work, coarse to fine; each level hangs on the one that steers it, the first on `guide`."""
    found: list[LevelStep] = []
    origin = (0, 0) if s.around is None else (s.around.window.box.y0, s.around.window.box.x0)
    guided = pass_.guided and s.guidance.covers(pass_.steps[number].t)
    for level, tiling in zip(s.plan.levels, pass_.tilings, strict=True):
        if tiling is not None:
            above = found[-1] if found and guided else None
            steers = guided and any(pass_.tilings[s.plan.levels.index(level) + 1 :])
            step = LevelStep(s, pass_, number, level, tiling, above, steers)
            found.append(replace(step, guide=guide if guided and not found else None, origin=origin))
    return found


def predict_window(
    s: Sampling, pass_: Pass, number: int, level: Level, tiling: Tiling, origin: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yield the averaged x0 of a window of a level at a step, top to bottom, (3, n, w); steers and writes nothing.

    `level` has the window's size, the canvas its latents, `tiling` its tiles; all lie at `origin` of the whole level.
    """
    work = LevelStep(s, pass_, number, level, tiling, None, steers=False, origin=origin)
    return work.averaged(s.denoiser.denoise(work.batches()))
