"""SSL grids from texts: DDIM over the whole grid, in windows where it is wider than what the prior was trained on.

Invariant: a grid is a function of (prior, texts and their masks, shape, steps, weight, seed); how many texts or windows
are evaluated together does not matter but for the last bits. It does not know words, files or pictures.
Source: cosine schedule and respaced steps of engine.model.cdm_sampler; averaged windows: MultiDiffusion (Bar-Tal et al.
2023); regions by masks on the clean prediction, as there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import Tensor

from engine.core.numerics import noise_array
from engine.model.cdm_sampler import respaced_scheduler, respaced_times
from engine.model.text.prior import TextPrior, TextTokens

Tick = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class TextRegions:
    """Texts, and how much each counts in every cell."""

    texts: TextTokens
    masks: NDArray[np.float32]
    """(texts, H, W); the masks of a cell add up to one."""
    negative: TextTokens | None = None
    """One text that is stepped away from; None: the null text."""


@dataclass(frozen=True)
class _Window:
    """A part of the grid that the prior is asked about at once."""

    rows: slice
    columns: slice
    share: Tensor
    """(h, w): how much it counts in each of its cells."""
    masks: Tensor
    """(n, h, w) of the texts that count in it."""
    texts: TextTokens
    """These n texts, and behind them what is stepped away from, where there is guidance."""


def windows_over(height: int, width: int, largest: int) -> list[tuple[int, int, int, int]]:
    """Return (y, x, h, w) of windows of at most `largest` cells on a side, half overlapping, that cover a grid."""
    return [
        (y, x, min(largest, height), min(largest, width))
        for y in _starts(height, largest)
        for x in _starts(width, largest)
    ]


def _starts(side: int, largest: int) -> list[int]:
    if side <= largest:
        return [0]
    count = -(-(side - largest) // max(largest // 2, 1))
    return [round(i * (side - largest) / count) for i in range(count + 1)]


@torch.no_grad()
def sample_grid(
    prior: TextPrior, asked: TextRegions, steps: int = 50, weight: float = 2.0, seed: int = 0, tick: Tick | None = None
) -> Float32[Tensor, "d h w"]:
    """Draw the SSL vectors of a canvas: float32 (D, H, W) on the prior's device.

    `weight` is w of classifier-free guidance, 0 = the text as it was learned. Raises: ValueError for masks that do not
    fit the texts, and for wrong counts of steps.
    """
    if asked.masks.ndim != 3 or len(asked.masks) != len(asked.texts.tokens):
        count = len(asked.texts.tokens)
        raise ValueError(f"there must be one mask (H, W) per text; got {asked.masks.shape} for {count}.")
    device = prior.mean.device
    height, width = asked.masks.shape[1:]
    windows = _windows(prior, asked, guided=weight > 0)
    times = respaced_times(steps)
    scheduler = respaced_scheduler(times)
    noise = noise_array(seed, "text/grid", (prior.config.ssl_dim, height, width))
    x = torch.from_numpy(noise).to(device)
    for done, k in enumerate(scheduler.timesteps):
        total, shares = torch.zeros_like(x), torch.zeros(height, width, device=device)
        for window in windows:
            found = _predict(prior, x[:, window.rows, window.columns], times[int(k)], window, weight)
            total[:, window.rows, window.columns] += window.share * found
            shares[window.rows, window.columns] += window.share
        x = scheduler.step(total / shares, int(k), x, return_dict=False)[0]
        if tick is not None:
            tick(done + 1, steps)
    return prior.restored(x[None])[0].float()


def _windows(prior: TextPrior, asked: TextRegions, guided: bool) -> list[_Window]:
    masks = torch.from_numpy(asked.masks).to(prior.mean.device)
    against = prior.null(asked.texts) if asked.negative is None else asked.negative
    found = []
    height, width = asked.masks.shape[1:]
    for y, x, h, w in windows_over(height, width, prior.config.window):
        rows, columns = slice(y, y + h), slice(x, x + w)
        present = [i for i, mask in enumerate(masks[:, rows, columns]) if bool((mask > 0).any())]
        texts = asked.texts.rows(present)
        texts = joined(texts, against) if guided else texts
        found.append(_Window(rows, columns, _tent(h, w).to(masks), masks[present, rows, columns], texts))
    return found


def _predict(prior: TextPrior, x: Tensor, t: int, window: _Window, weight: float) -> Tensor:
    """Return the guided x0 (D, h, w) of one window: each text's own, mixed by the masks."""
    count, wanted = len(window.texts.tokens), len(window.masks)
    found = prior(x.expand(count, -1, -1, -1), torch.full((count,), t, device=x.device), window.texts)
    mixed = (found[:wanted] * window.masks[:, None]).sum(0)
    return mixed + weight * (mixed - found[-1]) if count > wanted else mixed


def joined(*texts: TextTokens) -> TextTokens:
    """Return all texts in one batch; shorter ones are padded with tokens that do not count."""
    longest = max(t.tokens.shape[1] for t in texts)

    def padded(value: Tensor) -> Tensor:
        missing = longest - value.shape[1]
        return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], dim=1)

    return TextTokens(torch.cat([padded(t.tokens) for t in texts]), torch.cat([padded(t.counts) for t in texts]))


def _tent(height: int, width: int) -> Tensor:
    """Return how much a window counts in each of its cells (h, w): most in its middle, everywhere something."""
    sides = [torch.minimum(torch.arange(n) + 1.0, n - torch.arange(n)) for n in (height, width)]
    return sides[0][:, None] * sides[1][None]
