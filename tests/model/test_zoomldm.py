"""The bundle: dtypes, guidance in one call, the codebook, and the conditioners' own rules."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from engine.model.summarizer import CELL_TOKENS, Summarizer, TokenConditioner
from engine.model.zoomldm import ConditionerConfig, ModelConfig, ZoomLDM, quantise, tiny_config


def token_config(region_dim: int) -> ModelConfig:
    conditioner = ConditionerConfig("token", output_dim=32, region_dim=region_dim)
    return tiny_config(magnifications=("20x",), conditioner=conditioner)


def test_config_survives_json() -> None:
    config = tiny_config()
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.scale.factor("2.5x") == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magnifications": ("20x", "20x")}, "distinct"),
        ({"base_mpp": 0.0}, "positive"),
        ({"ssl_dim": 0}, "ssl_dim must be at least 1"),
        ({"scale_factor": 0.0}, "scale_factor must be positive"),
        ({"beta_start": 0.5}, "beta_start < beta_end"),
        ({"conditioner": ConditionerConfig(output_dim=64)}, "cross_attention_dim=32 must equal"),
    ],
)
def test_config_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


def test_config_names_unknown_and_missing_keys() -> None:
    values = tiny_config().to_json()
    with pytest.raises(ValueError, match="unknown keys.*mpp"):
        ModelConfig.from_json(values | {"mpp": 1})
    del values["encoder"]
    with pytest.raises(ValueError, match="encoder"):
        ModelConfig.from_json(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_have_the_callers_dtype_and_the_codebook_stays_wide(model: ZoomLDM, dtype: torch.dtype) -> None:
    model.to(dtype=dtype).requires_grad_(False)
    assert model.dtype == dtype
    assert model.vae.quantize.embedding.weight.dtype.itemsize >= 4
    assert model.alphas_cumprod.dtype == torch.float64
    context = model.summarize([torch.randn(16, 1, 1)], [0])
    assert context.dtype == dtype
    for x_t in (torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16).double()):
        assert model.predict_eps(x_t, 500, context, 2.0).dtype == x_t.dtype
        assert model.decode(x_t).shape == (1, 3, 64, 64)
        assert model.encode(model.decode(x_t)).dtype == x_t.dtype


def test_codebook_survives_a_trip_through_bfloat16(model: ZoomLDM) -> None:
    before = model.vae.quantize.embedding.weight.clone()
    model.to(torch.bfloat16)
    model.to(dtype=torch.float32)
    assert torch.equal(model.vae.quantize.embedding.weight, before)


def test_guidance_is_one_call_and_follows_the_formula(model: ZoomLDM) -> None:
    x_t, context = torch.randn(2, 3, 16, 16), model.summarize([torch.randn(16, 2, 2)] * 2, [1, 2])
    with torch.no_grad():
        cond = model.predict_eps(x_t, 300, context, 0.0)
        null = model.predict_eps(x_t, 300, model.null_context(2), 0.0)
        sizes: list[int] = []
        hook = model.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
        guided = model.predict_eps(x_t, torch.tensor([300, 300]), context, 3.0)
        model.predict_eps(x_t, 300, context, 0.0)
        hook.remove()
    assert sizes == [4, 2]
    assert torch.allclose(guided, 4 * cond - 3 * null, atol=1e-4)


def test_x0_inverts_the_noising(model: ZoomLDM) -> None:
    x0, eps = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    for alpha_bar in (0.999, 0.3, 0.005):
        x_t = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps
        assert torch.allclose(model.x0_from_eps(x_t, eps, alpha_bar), x0)


def test_channels_last_changes_the_layout_not_the_result(model: ZoomLDM) -> None:
    x_t, context = torch.randn(1, 3, 16, 16), model.null_context(1)
    with torch.no_grad():
        before = model.predict_eps(x_t, 10, context, 0.0)
        after = model.channels_last().predict_eps(x_t, 10, context, 0.0)
    assert model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(before, after, atol=1e-4)


def test_quantise_takes_the_nearest_code_and_passes_gradients() -> None:
    codes = torch.randn(50, 3)
    latents = torch.randn(2, 3, 4, 5, requires_grad=True)
    result = quantise(latents, codes)
    pixels = latents.detach().permute(0, 2, 3, 1)
    nearest = (pixels[..., None, :] - codes).square().sum(-1).argmin(-1)
    assert torch.allclose(result.permute(0, 2, 3, 1), codes[nearest], atol=1e-6)
    result.sum().backward()
    assert latents.grad is not None
    assert torch.equal(latents.grad, torch.ones_like(latents))


def test_a_latent_scale_is_undone_before_the_codebook() -> None:
    torch.manual_seed(0)
    plain = ZoomLDM(tiny_config()).requires_grad_(False)
    scaled = ZoomLDM(dataclasses.replace(plain.config, scale_factor=2.0), plain.networks)
    image = torch.rand(1, 3, 64, 64)
    assert torch.allclose(scaled.encode(image), 2 * plain.encode(image))
    assert torch.equal(scaled.decode(scaled.encode(image)), plain.decode(plain.encode(image)))


@pytest.mark.parametrize(("h", "w", "start"), [(1, 1, 32), (2, 2, 30), (1, 3, 31), (5, 7, 15), (8, 8, 0), (30, 2, 24)])
def test_cells_fill_the_middle_tokens_row_by_row(h: int, w: int, start: int) -> None:
    summarizer = Summarizer(tiny_config()).requires_grad_(False)
    cells = summarizer.prepare(torch.randn(16, h, w))
    tokens = summarizer._place(cells)
    count = cells.shape[1] * cells.shape[2]
    is_pad = (tokens == summarizer.pad_token[0]).all(dim=1)
    assert is_pad.nonzero().flatten().tolist() == [*range(start), *range(start + count, CELL_TOKENS)]
    last = summarizer.dim_reduce(cells[:, -1, -1])
    assert torch.allclose(tokens[start + count - 1], last, atol=1e-5)


def test_large_grids_are_averaged_before_they_are_standardised() -> None:
    grid = torch.randn(16, 16, 16)
    pooled = grid.reshape(16, 8, 2, 8, 2).mean(dim=(2, 4))
    expected = (pooled - pooled.mean(0)) / pooled.std(0)
    assert torch.allclose(Summarizer.prepare(grid), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("grids", "magnifications", "message"),
    [
        ([torch.ones(16, 1, 1)], [0], "constant or NaN"),
        ([torch.full((16, 1, 1), torch.nan)], [0], "constant or NaN"),
        ([torch.randn(15, 1, 1)], [0], "D = 16; got"),
        ([torch.randn(16, 1)], [0], r"must be \(D, h, w\)"),
        ([torch.randn(16, 1, 1)], [4], "0…3; got 4"),
        ([torch.randn(16, 1, 1)], [0, 1], "one magnification per grid"),
        ([], [], "at least one"),
    ],
)
def test_summarize_refuses(model: ZoomLDM, grids: list[Tensor], magnifications: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZoomLDM(tiny_config()).summarize(grids, magnifications)


def test_null_of_the_summarizer_is_zeros(model: ZoomLDM) -> None:
    assert torch.equal(model.null_context(2), torch.zeros(2, 65, 32))


def test_one_token() -> None:
    model = ZoomLDM(token_config(region_dim=0)).requires_grad_(False)
    assert isinstance(model.conditioner, TokenConditioner)
    vector = torch.randn(16, 1, 1)
    context = model.summarize([vector, 5 * vector], [0, 0])
    assert context.shape == (2, 1, 32)
    assert torch.allclose(context[0], context[1], atol=1e-6), "only the direction counts"
    assert torch.equal(model.null_context(1)[0, 0], model.conditioner.patch_fc.bias)
    with pytest.raises(ValueError, match="one cell per tile"):
        model.summarize([torch.randn(16, 2, 2)], [0])


def test_two_tokens_with_and_without_the_region() -> None:
    model = ZoomLDM(token_config(region_dim=24)).requires_grad_(False)
    assert isinstance(model.conditioner, TokenConditioner)
    assert model.conditioner.region_fc is not None
    tile, region = torch.randn(16, 1, 1), torch.randn(24, 1, 1)
    both, alone = model.summarize([torch.cat([tile, region]), tile], [0, 0])
    assert both.shape == (2, 32)
    assert torch.equal(both[0], alone[0])
    assert torch.equal(alone[1], model.conditioner.region_fc.bias)
    assert not torch.equal(both[1], alone[1])
    assert model.null_context(3).shape == (3, 2, 32)


def test_v_prediction_is_the_same_noise_in_other_words() -> None:
    torch.manual_seed(0)
    eps_model, v_model = ZoomLDM(tiny_config()), ZoomLDM(tiny_config(prediction_type="v_prediction"))
    v_model.unet.load_state_dict(eps_model.unet.state_dict())
    x_t, context = torch.randn(2, 3, 64, 64), torch.randn(2, 65, 32)
    with torch.no_grad():
        v = eps_model.predict_eps(x_t, 400, context, 1.5)  # the raw network, guided
        eps = v_model.predict_eps(x_t, 400, context, 1.5)
    a, b = float(v_model.alphas_cumprod[400]) ** 0.5, float(1 - v_model.alphas_cumprod[400]) ** 0.5
    torch.testing.assert_close(eps, a * v + b * x_t)
    # Salimans & Ho 2022: x0 = a·x_t − b·v
    torch.testing.assert_close(v_model.x0_from_eps(x_t, eps, a * a), a * x_t - b * v, atol=1e-4, rtol=1e-4)
