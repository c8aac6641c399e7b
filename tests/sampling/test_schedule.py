import numpy as np
import pytest
from diffusers import DDIMScheduler

from engine.sampling.schedule import betas, steps


def test_betas_are_diffusers_scaled_linear() -> None:
    theirs = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear").betas
    np.testing.assert_allclose(betas(), theirs.numpy(), rtol=1e-5)


def test_published_steps() -> None:
    found = steps(1000, 50)
    assert [s.t for s in found] == list(range(1000, 0, -50))
    alpha_bars = np.cumprod(1 - betas())
    assert found[3].alpha_bar == alpha_bars[849]
    assert found[3].alpha_bar_prev == alpha_bars[799]
    assert found[-1].alpha_bar_prev == alpha_bars[0]


def test_the_predecessors_last_step_is_clean() -> None:
    last = steps(1000, 20, last_clean=True)[-1]
    x0, noise = np.float32([0.3]), np.float32([5.0])
    assert last.update(x0, noise, noise) == pytest.approx(x0)


def test_update_keeps_the_variance_of_a_perfect_prediction() -> None:
    draw = np.random.default_rng(0)
    x0, eps, noise = draw.standard_normal((3, 200_000)).astype(np.float32)
    for step in steps(1000, 100):
        assert step.update(x0, eps, noise).var() == pytest.approx(1, abs=0.01)
        x_t = step.renoise(x0, eps)
        np.testing.assert_allclose(step.eps_from_x0(x_t, x0), eps, atol=2e-3)
