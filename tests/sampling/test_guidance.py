import numpy as np
import pytest
import torch
from torch import Tensor

from engine.core.numerics import box_reduce
from engine.model.colour_map import LinearColour
from engine.sampling.guidance import GuidePicture, LinearGuidance, steer_rows

MATRIX = torch.tensor([[0.5, 0.1, 0.0], [-0.1, 0.4, 0.2], [0.0, 0.1, -0.6]], dtype=torch.float64)


def linear_decoder(latents: Tensor) -> Tensor:
    """A decoder whose coarse colour is exactly affine in the latents."""
    colour = torch.einsum("ij,bjhw->bihw", MATRIX.float(), latents) + 0.1
    return colour.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.fixture(scope="module")
def pairs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(12, 3, 8, 8, generator=draw).repeat_interleave(8, 2).repeat_interleave(8, 3)
    latents = coarse + 0.3 * torch.randn(12, 3, 64, 64, generator=draw)
    return latents, linear_decoder(latents)


def test_a_linear_fit_finds_the_map_of_a_linear_decoder(pairs: tuple[Tensor, Tensor]) -> None:
    found = LinearColour.fit(*pairs)
    torch.testing.assert_close(found.matrix, MATRIX, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.offset, torch.full((3,), 0.1, dtype=torch.float64), atol=1e-5, rtol=1e-4)
    again = LinearColour.from_tensors(found.tensors())
    assert torch.equal(again.matrix, found.matrix)


@pytest.mark.parametrize("ratio", [2, 4, 16])
def test_the_corrected_canvas_is_closer_to_its_guide(ratio: int, pairs: tuple[Tensor, Tensor]) -> None:
    guidance = LinearGuidance(LinearColour.fit(*pairs), strength=1.0, damping=0.05)
    x0 = pairs[0][:1, :, :, :60].numpy()[0]  # 60: the last guided cell may hang over the edge
    wished = np.tanh(pairs[1][1:2].numpy()[0]).astype(np.float32)
    picture = box_reduce(torch.from_numpy(wished)[None], ratio)[0].numpy()
    guide = GuidePicture(picture, ratio)
    moved = steer_rows(guidance, x0, (0, 0, 64), guide)
    assert moved.shape == x0.shape

    def error(latents: np.ndarray) -> float:
        seen = box_reduce(linear_decoder(torch.from_numpy(latents)[None]), max(ratio, 4))
        wish = guide.cells(0, seen.shape[2], seen.shape[3])
        return float((seen - wish).square().mean())

    assert error(moved) < 0.5 * error(x0)


def test_bands_with_a_halo_equal_the_whole_canvas(pairs: tuple[Tensor, Tensor]) -> None:
    guide = GuidePicture(np.random.default_rng(0).uniform(-1, 1, (3, 32, 32)).astype(np.float32), 8)
    x0 = pairs[0][0].numpy()
    guidance = LinearGuidance(LinearColour.fit(*pairs), 1.0, 0.1)
    whole = steer_rows(guidance, x0, (0, 0, 64), guide)
    halo = guidance.halo_cells * guide.cell
    upper = steer_rows(guidance, x0[:, : 32 + halo], (0, 0, 32), guide)
    lower = steer_rows(guidance, x0[:, 32 - halo :], (32 - halo, 32, 64), guide)
    np.testing.assert_allclose(np.concatenate([upper, lower], axis=1), whole, atol=1e-5)


def test_squares_on_whole_px_are_cut_and_between_px_mixed() -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (3, 256, 256)).astype(np.float32)
    guide = GuidePicture(image, 16)
    assert np.array_equal(guide.square(192, 64, 16), image[:, 12:28, 4:20])
    between = guide.square(8, 0, 16)
    np.testing.assert_allclose(between, (image[:, 0:16, :16] + image[:, 1:17, :16]) / 2, atol=1e-6)
    assert guide.square(4095, 4095, 16).shape == (3, 16, 16)
