"""Summaries are a function of seed, magnification and number; the steps are DDIM's on the cosine schedule."""

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from engine.model.cdm import CDM, CDMConfig
from engine.model.cdm_sampler import alpha_bars, denoise_summaries, respaced_scheduler, respaced_times, sample_summaries


@pytest.fixture(scope="module")
def cdm() -> CDM:
    torch.manual_seed(0)
    found = CDM(CDMConfig(tokens=9, channels=8, magnifications=3, width=16, layers=2, heads=2))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.2)
    return found.eval()


def test_a_summary_is_a_function_of_seed_magnification_and_number(cdm: CDM) -> None:
    three = sample_summaries(cdm, 1, 3, steps=4, seed=7)
    assert three.shape == (3, 9, 8)
    assert three.dtype == torch.float32
    alone = torch.cat([sample_summaries(cdm, 1, 1, steps=4, seed=7, first=n) for n in range(3)])
    assert torch.equal(alone, three), "byte for byte, however they are drawn"
    together = sample_summaries(cdm, 1, 3, steps=4, seed=7, batch_size=2)
    assert torch.allclose(together, three, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(three[0], three[1])
    for other in (sample_summaries(cdm, 1, 3, steps=4, seed=8), sample_summaries(cdm, 2, 3, steps=4, seed=7)):
        assert not torch.allclose(other, three)


class Exact(CDM):
    """Predicts x0 = 0.3·x: DDIM then has a closed form."""

    def forward(self, x: Tensor, t: Tensor, magnification: Tensor) -> Tensor:
        del t, magnification
        return torch.cat([0.3 * x, x], dim=2)


@pytest.mark.parametrize("count", [2, 10, 200, 1000])
def test_steps_follow_each_other_and_end_clean(count: int) -> None:
    times = respaced_times(count)
    assert times[0] == 0
    assert times[-1] == 999
    assert len(set(times)) == count
    assert np.ptp(np.diff(times)) <= 1
    abar, x = alpha_bars(), 1.0
    for t, before in zip(reversed(times), [*reversed(times[:-1]), None], strict=True):
        x0 = 0.3 * x
        eps = (x - abar[t] ** 0.5 * x0) / (1 - abar[t]) ** 0.5
        kept = 1.0 if before is None else abar[before]
        x = kept**0.5 * x0 + (1 - kept) ** 0.5 * eps
    exact = Exact(CDMConfig(tokens=1, channels=1, magnifications=1, width=2, layers=1, heads=1))
    drawn = denoise_summaries(exact, torch.ones(1, 1, 1), 0, times)
    assert float(drawn) == pytest.approx(x, rel=2e-3)


def test_the_schedule_is_diffusers_squaredcos_cap_v2() -> None:
    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double().numpy()
    assert np.allclose(alpha_bars(), theirs, rtol=1e-3, atol=1e-7)
    kept = respaced_scheduler(respaced_times(10)).alphas_cumprod.double().numpy()
    assert np.allclose(kept, alpha_bars()[respaced_times(10)], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magnification": 3}, "must lie in 0…2; got 3"),
        ({"count": 0}, "at least 1; got 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"steps": 1}, r"must lie in 2..1000; got 1"),
        ({"steps": 1001}, r"must lie in 2..1000"),
    ],
)
def test_bad_input(cdm: CDM, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_summaries(cdm, **({"magnification": 0, "count": 1} | change))


def test_summaries_of_another_size_are_refused(cdm: CDM) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, 9, 8\); got \(1, 8, 9\)"):
        cdm(torch.zeros(1, 8, 9), torch.zeros(1), torch.zeros(1, dtype=torch.long))
