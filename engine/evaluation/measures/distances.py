"""How far apart two sets of vectors lie: Fréchet distance, KID, MIND. Float64 numpy alone.

Invariant: a figure is a pure function of the vectors (N, D) and of the seed. It does not know encoders or pictures.
Source: Heusel et al. 2017 (Fréchet distance of Gaussians); Bińkowski et al. 2018 (KID); Berthet et al. 2026,
arXiv 2605.06797 (MIND: the mean over directions of exact 1-D optimal transport).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating]
"""(N, D), one row per crop."""
_BLOCK = 64
"""Directions projected at once: 64 × 50 000 float64 are 26 MB."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def frechet_distance(a: Vectors, b: Vectors) -> float:
    """Return |μa − μb|² + tr(Ca + Cb − 2·(Ca·Cb)^½), covariances with n − 1; biased upwards the more, the fewer rows.

    The root's trace is that of (Ca^½ Cb Ca^½)^½, which is symmetric: two eigh and no complex numbers.
    Raises: ValueError for fewer than two rows, other widths or numbers that are not finite.
    """
    a, b = _checked(a, b, 2)
    difference = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = (np.atleast_2d(np.cov(v, rowvar=False)) for v in (a, b))
    values, axes = np.linalg.eigh(cov_a)
    root_a = (axes * np.sqrt(np.clip(values, 0, None))) @ axes.T
    product = root_a @ cov_b @ root_a
    shared = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum()
    return float(max(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * shared, 0.0))


def kernel_distance(a: Vectors, b: Vectors, subsets: int = 100, size: int = 1000, seed: int = 0) -> Estimate:
    """Return KID: the unbiased MMD² under (x·y/D + 1)³, its mean over random subsets of at most `size` rows.

    Negative values are possible and mean: no difference found. The interval holds 95 % of the subsets' values, divided
    by nothing: subsets overlap, so it says how far the value of one subset may lie, which overstates the mean's error.
    Raises: ValueError as `frechet_distance`.
    """
    a, b = _checked(a, b, 2)
    size = min(size, len(a), len(b))
    rng, values = np.random.default_rng(seed), np.empty(subsets)
    for i in range(subsets):
        rows_a, rows_b = (rng.choice(len(v), size, replace=False) for v in (a, b))
        values[i] = squared_mmd(a[rows_a], b[rows_b])
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def squared_mmd(a: Vectors, b: Vectors) -> float:
    """Return the unbiased MMD² of two sets under the cubic kernel (x·y/D + 1)³."""
    a, b = _checked(a, b, 2)
    within = sum(_mean_off_diagonal(_cubic(v, v)) for v in (a, b))
    return float(within - 2 * _cubic(a, b).mean())


def _cubic(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_off_diagonal(kernel: NDArray[np.float64]) -> float:
    n = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))


def sliced_distance(a: Vectors, b: Vectors, directions: int = 1000, seed: int = 0) -> float:
    """Return D times the mean of squared 1-D Wasserstein-2 distances along random unit directions.

    The factor D makes it |μa − μb|² for two sets that differ by a shift, as the Fréchet distance is.
    Sets of different size are compared at the quantiles of both. Raises: ValueError for no rows, as above otherwise.
    """
    a, b = _checked(a, b, 1)
    rng, width, total = np.random.default_rng(seed), a.shape[1], 0.0
    for first in range(0, directions, _BLOCK):
        count = min(_BLOCK, directions - first)
        axes = rng.standard_normal((width, count))
        axes /= np.linalg.norm(axes, axis=0)
        total += _transport(np.sort(a @ axes, axis=0), np.sort(b @ axes, axis=0))
    return width * total / directions


def _transport(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the sum over columns of ∫ (a⁻¹(u) − b⁻¹(u))² du, exactly; columns are sorted."""
    if len(a) == len(b):
        return float(((a - b) ** 2).mean(axis=0).sum())
    steps = np.union1d(np.arange(len(a) + 1) * len(b), np.arange(len(b) + 1) * len(a))  # in 1/(n·m), so exactly
    weight = np.diff(steps) / (len(a) * len(b))
    difference = a[steps[:-1] // len(b)] - b[steps[:-1] // len(a)]
    return float((weight @ difference**2).sum())


def paired_similarity(a: Vectors, b: Vectors, seed: int = 0) -> tuple[Estimate, float]:
    """Return the mean cosine of rows that belong together, with a bootstrap interval, and that of rows that do not.

    The second is what any two pictures score; a similarity says something only above it.
    Raises: ValueError if the sets differ in size, have fewer than two rows or hold a vector of zeros.
    """
    a, b = _checked(a, b, 2)
    if len(a) != len(b):
        raise ValueError(f"pairs need two sets of one size; got {len(a)} and {len(b)} rows. Pair them by name.")
    norms = [np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b)]
    if any((norm == 0).any() for norm in norms):
        raise ValueError("every vector must have a direction; got one of zeros. Leave that crop out.")
    cosines = (a / norms[0]) @ (b / norms[1]).T
    own, n = np.diag(cosines), len(a)
    rng = np.random.default_rng(seed)
    means = own[rng.integers(0, n, (1000, n))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(own.mean()), float(low), float(high)), _mean_off_diagonal(cosines)


def _checked(a: Vectors, b: Vectors, least: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"two sets of vectors must be (N, D) and (M, D); got {a.shape} and {b.shape}.")
    if min(len(a), len(b)) < least:
        raise ValueError(f"each set must have at least {least} vectors; got {len(a)} and {len(b)}. Take more crops.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("vectors must be finite; got NaN or infinity. Check the encoder, or use float32.")
    return a, b
