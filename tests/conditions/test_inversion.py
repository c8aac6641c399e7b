"""Condition inversion: the loss, what a picture teaches the grid, windows that share vectors, and determinism."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.conditions.inversion import Windows, encode_windows, inversion_loss, invert
from engine.core.errors import EngineError
from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.sampling.config import InversionConfig
from engine.sampling.plan import Level
from tests.support.tiny_run import narrow_model

FIVE = Level("5x", 4, 2, 64, 64)
QUICK = InversionConfig(steps=4, batch_size=2)


@pytest.fixture(scope="module")
def model() -> ZoomLDM:
    return narrow_model()


def found(
    model: ZoomLDM, size_px: tuple[int, int], config: InversionConfig = QUICK, level: Level = FIVE, seed: int = 0
):
    windows = Windows.over(size_px, level, config)
    picture = np.random.default_rng(1).uniform(-1, 1, (3, *windows.size_px)).astype(np.float32)
    latents = encode_windows(model, picture, windows)
    return invert(model, latents, windows, config, seed, lambda done, total: None)


def test_a_model_of_v_is_asked_for_its_eps(model: ZoomLDM) -> None:
    """The same network read as predicting v has the loss of the eps that its v implies."""
    torch.manual_seed(0)
    grids, latents, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    other = ZoomLDM(replace(model.config, prediction_type="v_prediction"), model.networks)
    t, alpha_bar = 700, float(model.alphas_cumprod[699])
    x_t = alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * noise
    with torch.no_grad():
        eps = other.predict_eps(x_t, t, model.summarize(list(grids), [2, 2]), 0.0)
        loss = inversion_loss(other, grids, latents, noise, t, 2, 0.0)
    expected = alpha_bar**0.5 * (1 - alpha_bar) * (eps - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected)


def test_equal_cells_are_penalised(model: ZoomLDM) -> None:
    grids = torch.randn(1, 16, 1, 1).expand(1, 16, 4, 4)
    latents, noise = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        free, pushed = (inversion_loss(model, grids, latents, noise, 500, 2, v) for v in (0.0, 0.05))
    torch.testing.assert_close(pushed, free - 0.05)


def test_the_loss_falls(model: ZoomLDM) -> None:
    """Mean loss of the grid that is found, over timesteps and new noise, against that of the start."""
    config = InversionConfig(steps=30, batch_size=1)
    windows = Windows.over((256, 256), FIVE, config)
    latents = encode_windows(model, np.full((3, 256, 256), 0.5, np.float32), windows)
    grid = invert(model, latents, windows, config, 0, lambda done, total: None)
    start = np.random.default_rng(np.random.SeedSequence(0)).standard_normal(grid.shape, dtype=np.float32)

    def loss(vectors: np.ndarray) -> float:
        draw = torch.Generator().manual_seed(5)
        noise = torch.randn(16, 3, 64, 64, generator=draw)
        given = torch.from_numpy(vectors)[None]
        with torch.no_grad():
            all_ = [
                inversion_loss(model, given, latents, noise[i : i + 1], t, 2, config.variety)
                for i, t in enumerate(range(50, 850, 50))
            ]
        return float(torch.cat(all_).mean())

    assert loss(grid) < loss(start) - 1e-4


def test_the_same_picture_gives_the_same_grid(model: ZoomLDM) -> None:
    first, second, other = (found(model, (256, 256), seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_no_weight_learns(model: ZoomLDM) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found(model, (256, 256))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("factor", "size_px", "shape", "count"),
    [
        (4, (256, 256), (4, 4), 1),
        (4, (300, 256), (5, 4), 2),
        (4, (512, 384), (8, 6), 6),
        (2, (256, 512), (2, 4), 3),
        (16, (256, 320), (16, 20), 2),
        (4, (64, 64), (4, 4), 1),
    ],
)
def test_windows_cover_the_picture(factor: int, size_px: tuple[int, int], shape: tuple[int, int], count: int) -> None:
    windows = Windows.over(size_px, Level("any", factor, factor.bit_length() - 1, 64, 64), InversionConfig())
    assert len(windows.tiling) == count
    assert tuple(side * windows.cells for side in windows.shape) == shape
    assert all(covered >= side for covered, side in zip(windows.size_px, size_px, strict=True))


def test_a_larger_picture_is_one_grid(model: ZoomLDM) -> None:
    grid = found(model, (300, 512))
    assert grid.shape == (16, 5, 8)
    assert np.isfinite(grid).all()


def test_each_window_sees_its_part_of_the_picture(model: ZoomLDM) -> None:
    """Windows of 4 vectors, 2 apart: at 5x a vector is 64 px."""
    windows = Windows.over((300, 384), FIVE, QUICK)
    picture = np.random.default_rng(1).uniform(-1, 1, (3, *windows.size_px)).astype(np.float32)
    corners = [(0, 0), (0, 128), (64, 0), (64, 128)]
    with torch.no_grad():
        parts = [model.encode(torch.from_numpy(picture[None, :, y : y + 256, x : x + 256])) for y, x in corners]
    torch.testing.assert_close(encode_windows(model, picture, windows), torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_cells_that_the_conditioner_would_average_share_a_vector(model: ZoomLDM) -> None:
    config = tiny_config(magnifications=("20x", "10x", "5x", "2.5x", "1.25x"))
    grid = found(ZoomLDM(config), (256, 256), level=Level("1.25x", 16, 4, 64, 64))
    assert grid.shape == (16, 16, 16)
    assert np.array_equal(grid[:, ::2, ::2], grid[:, 1::2, 1::2])


def test_a_grid_that_diverges_is_an_error(model: ZoomLDM) -> None:
    windows = Windows.over((256, 256), FIVE, QUICK)
    with pytest.raises(EngineError, match=r"t=950 they are not\. Use model\.dtype=float32"):
        invert(model, torch.full((1, 3, 64, 64), torch.nan), windows, QUICK, 0, lambda done, total: None)


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"lr": 0}, {"variety": -1}, {"overlap": 0.95}, {"batch_size": 0}])
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"inversion.{next(iter(wrong))}"):
        InversionConfig(**wrong)  # type: ignore[arg-type]


def test_timesteps_run_from_950_to_50() -> None:
    steps = InversionConfig().timesteps
    assert (len(steps), steps[0], steps[-1]) == (200, 950, 50)
    assert steps == sorted(steps, reverse=True)
