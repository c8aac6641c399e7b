"""Distances and coverage have the values that closed forms and other libraries give."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from engine.evaluation.measures.coverage import coverage_of, kth_distance, memorisation
from engine.evaluation.measures.distances import (
    frechet_distance,
    kernel_distance,
    paired_similarity,
    sliced_distance,
    squared_mmd,
)

RNG = np.random.default_rng(0)
A = RNG.normal(size=(300, 12))
B = RNG.normal(size=(250, 12)) @ RNG.normal(size=(12, 12)) + 0.5


class Passing(nn.Module):
    """A network that returns what it is given: torchmetrics then sees our vectors."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def with_moments(mean: np.ndarray, cov: np.ndarray, n: int) -> np.ndarray:
    """Vectors whose sample mean and covariance are exactly these."""
    raw = np.random.default_rng(1).normal(size=(n, len(mean)))
    raw -= raw.mean(axis=0)
    whitened = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False)).T)
    return whitened @ np.linalg.cholesky(cov).T + mean


def test_frechet_distance_of_gaussians_that_commute() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 16.0])
    shift = np.array([3.0, 0.0, -1.0])
    found = frechet_distance(with_moments(np.zeros(3), np.diag(a), 50), with_moments(shift, np.diag(b), 60))
    assert found == pytest.approx((shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


def test_frechet_distance_of_a_set_to_itself_and_of_fewer_rows_than_columns() -> None:
    assert frechet_distance(A, A) == pytest.approx(0, abs=1e-9)
    few = frechet_distance(A[:5], A[5:10])
    assert math.isfinite(few)
    assert frechet_distance(A[:5], A[:5] + 1) == pytest.approx(A.shape[1])
    assert few > frechet_distance(A[:150], A[150:])


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_frechet_distance_and_kid_agree_with_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = torch.from_numpy(A).float(), torch.from_numpy(B).float()
    fid = FrechetInceptionDistance(feature=Passing(), input_img_size=(12,))
    fid.set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=Passing(), subsets=1, subset_size=250)
    for metric in (fid, kid):
        metric.update(a[:250], real=False)
        metric.update(b, real=True)
    ours = frechet_distance(a[:250].numpy(), b.numpy())
    assert ours == pytest.approx(float(fid.compute()), rel=1e-5)
    mean, _ = kid.compute()
    assert squared_mmd(a[:250].numpy(), b.numpy()) == pytest.approx(float(mean), rel=1e-4)


def test_unbiased_mmd_by_its_definition() -> None:
    a, b = A[:6], B[:5]

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 12 + 1) ** 3

    within_a = np.mean([kernel(a[i], a[j]) for i in range(6) for j in range(6) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert squared_mmd(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_kid_is_zero_on_average_without_a_difference_and_a_function_of_the_seed() -> None:
    values = [kernel_distance(*np.random.default_rng(i).normal(size=(2, 80, 4)), 5, 40).value for i in range(30)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(30)
    assert min(values) < 0
    found = kernel_distance(A, B, 20, 100, seed=3)
    assert found == kernel_distance(A, B, 20, 100, seed=3)
    assert found != kernel_distance(A, B, 20, 100, seed=4)
    assert found.low < found.value < found.high


def test_sliced_distance_of_a_shift_is_its_square() -> None:
    shift = np.full(12, 0.5)
    assert sliced_distance(A, A + shift, 20_000) == pytest.approx(3.0, rel=0.03)
    assert sliced_distance(A, A[::-1]) == pytest.approx(0, abs=1e-12)


def test_sliced_distance_of_sets_of_different_size_is_exact() -> None:
    line = np.arange(4.0)[:, None]
    twice = line.repeat(3, axis=0)
    assert sliced_distance(line, twice) == pytest.approx(0, abs=1e-12)
    # 0, 1 against 0.5: each half moves 0.5
    assert sliced_distance(np.array([[0.0], [1.0]]), np.array([[0.5]])) == pytest.approx(0.25)
    # Steps of 1/3 against halves: a sixth moves 1, a third moves 2.
    assert sliced_distance(np.array([[0.0], [1.0]]), np.array([[0.0], [0.0], [3.0]])) == pytest.approx(1.5)


def test_similarity_of_pairs_is_above_that_of_others() -> None:
    near = A + 0.1 * RNG.normal(size=A.shape)
    own, others = paired_similarity(A, near)
    assert own.value > 0.95
    assert abs(others) < 0.05
    assert own.low <= own.value <= own.high
    with pytest.raises(ValueError, match="one size"):
        paired_similarity(A, A[:10])
    with pytest.raises(ValueError, match="zeros"):
        paired_similarity(A[:3], np.zeros((3, 12)))


@pytest.mark.parametrize("measure", [frechet_distance, squared_mmd])
def test_too_few_or_broken_vectors_are_refused(measure) -> None:
    with pytest.raises(ValueError, match="at least 2 vectors; got 1"):
        measure(A[:1], B)
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        measure(A[:, :3], B)
    with pytest.raises(ValueError, match="finite"):
        measure(np.where(A > 2, np.nan, A), B)


def test_coverage_by_hand() -> None:
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    generated = np.array([[0.4], [0.6], [50.0]])
    found = coverage_of(generated, real, k=1)
    # Balls of the real: 1, 1, 1, 8. Of the generated: 0.2, 0.2, 49.4.
    assert found.precision == pytest.approx(2 / 3)
    assert found.density == pytest.approx((2 + 2 + 0) / 3)
    assert found.coverage == pytest.approx(2 / 4)
    # 50 ± 49.4 holds 1, 2 and 10; 0 is in none.
    assert found.recall == pytest.approx(3 / 4)


def test_coverage_tells_a_set_that_lacks_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.concatenate([RNG.normal(size=(100, 3)), RNG.normal(size=(100, 3)) + 20])
    one_mode = RNG.normal(size=(200, 3))
    found = coverage_of(one_mode, real)
    assert found.precision > 0.8
    assert 0.35 < found.coverage < 0.55
    assert found.recall < 0.6
    monkeypatch.setattr("engine.evaluation.measures.coverage._ROWS", 7)
    assert coverage_of(one_mode, real) == found
    assert kth_distance(real, 3) == pytest.approx(np.sort(np.linalg.norm(real[:, None] - real, axis=2))[:, 3])


def test_coverage_needs_neighbours() -> None:
    with pytest.raises(ValueError, match="more than 5 vectors"):
        coverage_of(A[:5], B)


def test_copies_of_the_training_set_are_seen() -> None:
    training, unseen = A[:150], A[150:]
    copies = training[:100] + 1e-3
    found = memorisation(copies, unseen, training)
    assert found.ratio < 0.01
    assert found.copied_share == 1
    assert found.closest == found.closest_training
    honest = memorisation(RNG.normal(size=(200, 12)), unseen, training)
    assert honest.ratio == pytest.approx(1, abs=0.1)
    assert honest.copied_share < 0.05
    with pytest.raises(ValueError, match="width 12"):
        memorisation(A, B, np.zeros((0, 12)))
