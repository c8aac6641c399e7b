"""The parts of a denoiser's loss, for errors whose answer is known."""

import pytest
import torch

from engine.training.denoiser.loss import noise_shares, noisy_latents, squared_errors, wanted_output


def test_coarse_terms_are_errors_averaged_over_squares() -> None:
    error = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    eighths = error.unflatten(3, (8, 8)).unflatten(2, (8, 8)).mean(dim=(3, 5)).square().mean(dim=(1, 2, 3))
    whole = error.mean(dim=(2, 3)).square().mean(dim=1)
    plain = error.square().mean(dim=(1, 2, 3))
    assert torch.allclose(squared_errors(error, (1.0, 2.0)), plain + eighths + 2 * whole)
    assert torch.allclose(squared_errors(error, (0.0, 0.0)), plain)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_what_a_network_should_say_gives_the_noise_and_the_picture_back(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 64, 64, generator=generator) for _ in range(2))
    shares = noise_shares(torch.linspace(0.99, 0.1, 1000, dtype=torch.float64), torch.tensor([10, 900]))
    x_t, said = noisy_latents(shares, x0, noise), wanted_output(kind, shares, x0, noise)
    a, b = shares
    eps = said if kind == "epsilon" else a * said + b * x_t
    assert torch.allclose(eps, noise, atol=1e-5)
    assert torch.allclose((x_t - b * eps) / a, x0, atol=1e-5)
