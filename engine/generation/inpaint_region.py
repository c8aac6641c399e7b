"""A part of a finished picture that is sampled again: which tiles, which steps, and how new and old are mixed.

Invariants: outside the window nothing changes; on the region all is new; the window's rim fades between them, except at
the picture's own border. It does not know files, models or how the old picture came about.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from engine.core.streaming import Box, ReadRows
from engine.core.units import LATENT_FACTOR, TILE_LATENT_PX
from engine.sampling.plan import Level, Plan, Tiling, make_tiling, touching

RIM = 16
"""Latent px over which new latents fade into the old ones: what neighbours share at the default tile stride."""
RIM_PX = 32
"""Px over which the decoded window fades into the old picture: half the rim, where new latents are still mostly old."""


@dataclass(frozen=True)
class Window:
    """A box of a level that is sampled again, and how much of each px is new. Units: px of whatever `size` is in."""

    box: Box
    size: tuple[int, int]
    """(h, w) of the whole level."""
    rim: int = RIM

    def share(self, part: Box) -> np.ndarray:
        """Return the share of the new in each px of a part of the window: float32 (1, h, w)."""
        height, width = self.size
        ys = _fade(np.arange(part.y0, part.y1), (self.box.y0, self.box.y1), height, self.rim)
        xs = _fade(np.arange(part.x0, part.x1), (self.box.x0, self.box.x1), width, self.rim)
        return np.outer(ys, xs).astype(np.float32)[None]

    def pixels(self, size_px: tuple[int, int]) -> "Window":
        """Return the window of a picture (h, w) that this one of its latents makes."""
        (y0, x0), (y1, x1) = ((self.box.y0, self.box.x0), (self.box.y1, self.box.x1))
        f = LATENT_FACTOR
        whole = Box(0, 0, *size_px)
        return Window(Box(y0 * f, x0 * f, y1 * f, x1 * f).within(whole), size_px, RIM_PX)


def _fade(at: np.ndarray, ends: tuple[int, int], size: int, rim: int) -> np.ndarray:
    """Return 1 inside and a raised cosine towards each end that is not the level's own border."""
    before = at - ends[0] + 0.5 if ends[0] > 0 else np.full(at.shape, np.inf)
    after = ends[1] - at - 0.5 if ends[1] < size else np.full(at.shape, np.inf)
    return np.sin(np.pi / 2 * np.clip(np.minimum(before, after) / rim, 0, 1)) ** 2


def mix(old: np.ndarray, new: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return old + share·(new − old); where the share is 1, `new` to the bit."""
    return np.where(share == 1, new, old + share * (new - old))


def laid_over(
    old: np.ndarray, box: Box, window: Window, read: Callable[[int, int, int, int], np.ndarray]
) -> np.ndarray:
    """Return a box of the old, (3, h, w), with the new mixed in; `read` gives (y0, y1, x0, x1) of the window."""
    shared = box.within(window.box)
    if 0 in shared.size:
        return old
    inner, at = shared.moved(window.box.y0, window.box.x0), shared.moved(box.y0, box.x0)
    part = np.s_[:, at.y0 : at.y1, at.x0 : at.x1]
    out = old.copy()
    out[part] = mix(old[part], read(inner.y0, inner.y1, inner.x0, inner.x1), window.share(shared))
    return out


@dataclass(frozen=True)
class OldPicture:
    """The sampler's `Surroundings` of a window: the finished picture it lies in. Rows count from the window's top."""

    window: Window
    read: ReadRows
    """(y0, y1) → the old latents, float32 (3, y1−y0, w)."""

    @property
    def origin(self) -> tuple[int, int]:
        return self.window.box.y0, self.window.box.x0

    def old(self, y0: int, y1: int) -> np.ndarray:
        return self.read(y0, y1)

    def mix(self, y0: int, predicted: np.ndarray, old: np.ndarray | None = None) -> np.ndarray:
        """Mix rows from y0 on with the old ones (None: the old latents), (3, n, w): tiles outside predict what was."""
        y1 = y0 + predicted.shape[1]
        box = self.window.box
        share = self.window.share(Box(box.y0 + y0, box.x0, box.y0 + y1, box.x1))
        return mix(self.read(y0, y1) if old is None else old, predicted, share)


def window_under(plan: Plan, region: Box) -> tuple[Tiling, Window]:
    """Return the finest level's window for a region (px), and its tiles, whose corners count from the window's.

    They are the tiles that touch the region, and the next ones on a side where less than the rim would be left.
    """
    joint, level = plan.finest_pass.tilings[-1], plan.finest
    assert joint is not None  # it is the pass that samples it
    under = region.latent()
    _, box = touching(joint, under)
    wanted = Box(
        under.y0 if under.y0 - box.y0 >= RIM else max(under.y0 - RIM, 0),
        under.x0 if under.x0 - box.x0 >= RIM else max(under.x0 - RIM, 0),
        under.y1 if box.y1 - under.y1 >= RIM else min(under.y1 + RIM, level.height),
        under.x1 if box.x1 - under.x1 >= RIM else min(under.x1 + RIM, level.width),
    )
    tiling, box = touching(joint, wanted)
    return tiling, Window(box, (level.height, level.width))


def window_plan(plan: Plan, region: Box, from_t: int) -> Plan:
    """Cut the plan of a window: the finest level alone, from the first timestep at or below `from_t`.

    A refinement tiles the window anew: its tiles seldom end where those of the first pass do.
    Raises: ValueError when no step is left.
    """
    first, last = plan.finest_pass.steps[0].t, plan.finest_pass.steps[-1].t
    if not last <= from_t <= first:
        raise ValueError(f"from_t must lie in {last}..{first}, the run's own timesteps; got {from_t}.")
    tiling, window = window_under(plan, region)
    height, width = window.box.size
    level: Level = replace(plan.finest, height=height, width=width)
    passes = []
    for pass_ in plan.passes:
        whole = pass_.tilings[-1]
        steps = tuple(step for step in pass_.steps if step.t <= from_t)
        if whole is None or not steps:
            continue
        inner = tiling if pass_ is plan.finest_pass else make_tiling(height, width, _stride(whole), whole.batch_size)
        passes.append(replace(pass_, steps=steps, tilings=(inner,), begins="latents"))
    return Plan((level,), tuple(passes), (plan.decode,), (height * LATENT_FACTOR, width * LATENT_FACTOR))


def _stride(tiling: Tiling) -> int:
    """Return the distance between a tiling's tiles; a tile's size when there is but one."""
    steps = [b - a for starts in (tiling.ys, tiling.xs) for a, b in zip(starts, starts[1:], strict=False)]
    return max(steps, default=TILE_LATENT_PX)
