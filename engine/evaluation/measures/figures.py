"""Every figure of two sets of vectors, each with what it should be read against.

Invariant: a figure never stands alone. `floor` is what half of B scores against the other half: what no difference
looks like; `ceiling` what that half blurred scores; `at_floor_n` the same figure of A with as many crops as the floor
has, because some figures depend on how many there are. It does not know files.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.evaluation.config import QualityConfig
from engine.evaluation.measures.coverage import coverage_of, memorisation
from engine.evaluation.measures.distances import (
    Estimate,
    Vectors,
    frechet_distance,
    kernel_distance,
    paired_similarity,
    sliced_distance,
)
from engine.evaluation.samples.encoders import CLIP, INCEPTION
from engine.evaluation.samples.vectors import VectorSet

Better = Literal["lower", "higher", "near 1"]
SMALL = 2
"""Below this many crops per dimension a Fréchet distance is mostly bias: covariances of few more rows than columns."""


@dataclass(frozen=True)
class Figure:
    """One number and what it should be read against; None where it cannot be had, which `note` then explains."""

    name: str
    value: float | None
    better: Better
    n_a: int
    n_b: int
    low: float | None = None
    """95 % interval."""
    high: float | None = None
    floor: float | None = None
    ceiling: float | None = None
    at_floor_n: float | None = None
    floor_n: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Halves:
    """What floors and ceilings are made of: two parts of B and one of A, of one size: half of B, or all of A."""

    a: Vectors
    first: Vectors
    second: Vectors
    blurred: Vectors | None
    """`first`, blurred."""

    @classmethod
    def of(cls, a: VectorSet, b: VectorSet, seed: int) -> "Halves":
        """Part B by the seed."""
        half = min(len(a), len(b) // 2)
        order = np.random.default_rng(seed).permutation(len(b))
        one, two = order[:half], order[half : 2 * half]
        return cls(a.vectors[:half], b.vectors[one], b.vectors[two], None if b.blurred is None else b.blurred[one])


def set_figures(a: VectorSet, b: VectorSet, config: QualityConfig) -> list[Figure]:
    """Return Fréchet distance, KID, MIND, precision, recall, density and coverage of A against B.

    Raises: ValueError if a set has fewer than two vectors.
    """
    halves = Halves.of(a, b, config.seed)
    size = kid_size(config, len(a), len(b))
    small = kid_size(config, len(halves.a), len(halves.first))

    def kid(x: Vectors, y: Vectors, n: int = small) -> Estimate:
        return kernel_distance(x, y, config.kid_subsets, n, config.seed)

    def mind(x: Vectors, y: Vectors) -> float:
        return sliced_distance(x, y, config.directions, config.seed)

    whole = kid(a.vectors, b.vectors, size)
    base = Figure("", None, "lower", len(a), len(b))
    figures = [
        replace(
            _read_against(base, halves, frechet_distance),
            name=frechet_name(a.encoder),
            value=frechet_distance(a.vectors, b.vectors),
            note=_too_few(min(len(a), len(b)), a.vectors.shape[1]),
        ),
        replace(
            _read_against(base, halves, lambda x, y: kid(x, y).value),
            name="KID",
            value=whole.value,
            low=whole.low,
            high=whole.high,
            note=f"cubic kernel, unbiased, {config.kid_subsets} subsets of {size}",
        ),
        replace(
            _read_against(base, halves, mind),
            name="MIND",
            value=mind(a.vectors, b.vectors),
            note=f"{config.directions} directions, D times the mean of squared 1-D distances",
        ),
    ]
    return figures + _coverages(a, b, halves, config.neighbours)


def kid_size(config: QualityConfig, *lengths: int) -> int:
    """Return the size of KID's subsets: half of the smaller set at most, or subsets would all be the same."""
    return max(2, min(config.kid_size, *(n // 2 for n in lengths)))


def frechet_name(encoder: str) -> str:
    """Return what the Fréchet distance is called with an encoder: papers call it FID by where vectors come from."""
    return {CLIP: "CLIP FID", INCEPTION: "FID"}.get(encoder, f"Fréchet distance ({encoder})")


def _too_few(n: int, dim: int) -> str:
    if n >= SMALL * dim:
        return ""
    return f"n = {n} is below 2·D = {SMALL * dim}: mostly bias; compare with the floor, or take KID"


def _read_against(figure: Figure, halves: Halves, measure: Callable[[Vectors, Vectors], float]) -> Figure:
    """Add floor, ceiling and the value at the floor's n."""
    if len(halves.first) < 2:
        return figure
    blurred, enough = halves.blurred, len(halves.a) == len(halves.second)
    return replace(
        figure,
        floor=measure(halves.first, halves.second),
        ceiling=None if blurred is None else measure(blurred, halves.second),
        at_floor_n=measure(halves.a, halves.second) if enough else None,
        floor_n=len(halves.first),
    )


def _coverages(a: VectorSet, b: VectorSet, halves: Halves, k: int) -> list[Figure]:
    kinds: list[tuple[str, Better]] = [
        ("precision", "higher"), ("recall", "higher"), ("density", "near 1"), ("coverage", "higher")
    ]  # fmt: skip
    if min(len(a), len(b)) <= k:
        note = f"{k} neighbours need more than {k} crops in each set"
        return [Figure(name, None, better, len(a), len(b), note=note) for name, better in kinds]
    whole, figures = coverage_of(a.vectors, b.vectors, k), []
    pairs = {"floor": halves.first, "ceiling": halves.blurred, "at_floor_n": halves.a}
    beside = {
        name: coverage_of(v, halves.second, k)
        for name, v in pairs.items()
        if v is not None and min(len(v), len(halves.second)) > k and len(v) == len(halves.second)
    }
    for name, better in kinds:
        values = {which: getattr(found, name) for which, found in beside.items()}
        figure = Figure(name, getattr(whole, name), better, len(a), len(b), note=f"k = {k}")
        figures.append(replace(figure, **values, floor_n=len(halves.second) if beside else None))
    return figures


def pair_figure(a: Vectors, b: Vectors, seed: int, name: str = "embedding similarity") -> Figure:
    """Return the mean cosine of pairs; its floor is what unrelated pictures score."""
    found, others = paired_similarity(a, b, seed)
    note = "mean cosine of pairs; floor: of rows that do not belong together"
    return Figure(name, found.value, "higher", len(a), len(b), found.low, found.high, floor=others, note=note)


def memory_figure(a: VectorSet, b: VectorSet, training: NDArray[np.float32]) -> tuple[Figure, dict[str, object]]:
    """Return the ratio of nearest-neighbour distances to the training set, and what it is made of."""
    found = memorisation(a.vectors, b.vectors, training)
    note = (
        f"median distance of A to its nearest of {len(training)} training crops, over that of B; "
        f"{found.copied_share:.1%} of A lie nearer than 99 % of B (1 % expected)"
    )
    figure = Figure("memorisation", found.ratio, "near 1", len(a), len(b), note=note)
    return figure, dict(vars(found))
