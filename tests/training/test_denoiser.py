"""Batches are a function of (seed, step); conditions drop at the stated rate; the average is exported."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.model.demo_encoder import DemoEncoder
from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.training.denoiser import (
    Batch,
    DenoiserNetworks,
    LatentTiles,
    denoiser_loss,
    draw_batch,
)
from engine.training.loop import Optimisation
from engine.training.run import export_average
from engine.training.settings import DenoiserSettings, TrainingConfig

SETTINGS = DenoiserSettings(
    steps=2, batch_size=2, lr=0.01, warmup=0, ema=0.5, magnification_weights=(0.4, 0.2, 0.2, 0.2)
)


def model() -> ZoomLDM:
    torch.manual_seed(0)
    return ZoomLDM(tiny_config())


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("x0", "noise", "times", "dropped"))
    grids = all(torch.equal(x, y) for x, y in zip(a.grids, b.grids, strict=True))
    return tensors and a.magnifications == b.magnifications and grids


def test_batches_are_a_function_of_seed_and_step(latent_tiles: LatentTiles) -> None:
    first = draw_batch(latent_tiles, SETTINGS, 0, 5, "cpu")
    draw_batch(latent_tiles, SETTINGS, 0, 6, "cpu")
    assert same(first, draw_batch(latent_tiles, SETTINGS, 0, 5, "cpu"))
    assert not torch.equal(first.noise, draw_batch(latent_tiles, SETTINGS, 0, 6, "cpu").noise)
    assert not torch.equal(first.noise, draw_batch(latent_tiles, SETTINGS, 1, 5, "cpu").noise)


def test_conditions_are_dropped_and_magnifications_drawn_at_the_stated_rates(latent_tiles: LatentTiles) -> None:
    settings = replace(SETTINGS, batch_size=8, drop_condition=0.1)
    batches = [draw_batch(latent_tiles, settings, 0, step, "cpu") for step in range(250)]
    dropped = torch.cat([b.dropped for b in batches]).float().mean()
    assert float(dropped) == pytest.approx(0.1, abs=0.03)
    levels = np.bincount([m for b in batches for m in b.magnifications], minlength=4) / 2000
    assert levels == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.05)
    times = torch.cat([b.times for b in batches])
    assert int(times.min()) >= 0
    assert int(times.max()) <= 999
    strata = torch.stack([b.times.sort().values for b in batches]) * 8 // 1000
    assert torch.equal(strata, torch.arange(8).expand(250, 8))


def test_a_dropped_condition_is_the_null_condition(latent_tiles: LatentTiles) -> None:
    bundle, batch = model(), draw_batch(latent_tiles, SETTINGS, 0, 0, "cpu")
    plain = replace(SETTINGS, coarse_weights=(0.0, 0.0))
    dropped = replace(batch, dropped=torch.ones(2, dtype=torch.bool))
    loss, _ = denoiser_loss(bundle, dropped, plain, bfloat16=False)
    a = bundle.alphas_cumprod[batch.times].float()[:, None, None, None]
    x_t = a.sqrt() * batch.x0 + (1 - a).sqrt() * batch.noise
    v = bundle.unet(x_t, batch.times, encoder_hidden_states=torch.zeros(2, 65, 32)).sample
    wanted = a.sqrt() * batch.noise - (1 - a).sqrt() * batch.x0
    assert float(loss.detach()) == pytest.approx(float((v - wanted).square().mean().detach()), rel=1e-4)


@torch.no_grad()
def test_coarse_terms_are_errors_averaged_over_squares(latent_tiles: LatentTiles) -> None:
    """For a network that answers zero, the error is v itself, so each term has a closed form."""
    bundle, batch = model(), draw_batch(latent_tiles, replace(SETTINGS, batch_size=4), 0, 0, "cpu")
    torch.nn.init.zeros_(bundle.unet.conv_out.weight)
    torch.nn.init.zeros_(bundle.unet.conv_out.bias)
    settings = replace(SETTINGS, coarse_weights=(1.0, 2.0))
    loss, _ = denoiser_loss(bundle, batch, settings, bfloat16=False)
    alpha_bar = bundle.alphas_cumprod[batch.times].float()[:, None, None, None]
    v = alpha_bar.sqrt() * batch.noise - (1 - alpha_bar).sqrt() * batch.x0
    eighths = v.unflatten(3, (8, 8)).unflatten(2, (8, 8)).mean(dim=(3, 5)).square().mean()
    whole = v.mean(dim=(2, 3)).square().mean()
    assert float(loss) == pytest.approx(float(v.square().mean() + eighths + 2 * whole), rel=1e-4)


def test_the_average_is_exported_and_training_goes_on_from_the_raw_weights(
    latent_tiles: LatentTiles, tmp_path: Path
) -> None:
    bundle = model()
    networks = DenoiserNetworks(bundle)
    optimisation = Optimisation(networks, SETTINGS, tmp_path / "denoiser.pt", 1e9)
    optimisation.run(
        lambda step, _: denoiser_loss(bundle, draw_batch(latent_tiles, SETTINGS, 0, step, "cpu"), SETTINGS, False)
    )
    raw = {k: v.clone() for k, v in networks.state_dict().items()}
    cells = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = DemoEncoder.fit(cells, dim=16)
    config = TrainingConfig(run=str(tmp_path), out=str(tmp_path / "model"), bfloat16=False, picture_stride=500)
    export_average(bundle, optimisation, latent_tiles, encoder, {"20x": 30.0}, config)
    assert all(torch.equal(v, raw[k]) for k, v in networks.state_dict().items())
    stored = DenoiserNetworks(ZoomLDM.from_pretrained(str(tmp_path / "model"))).state_dict()
    for name, value in optimisation.average.values.items():
        assert torch.equal(stored[name].half(), value.half()), name
    assert any(not torch.equal(stored[k].half(), v.half()) for k, v in raw.items())
    for file in (
        "training.json",
        "reference.safetensors",
        "reference.png",
        "encoder/model.safetensors",
        "guidance/linear.safetensors",
    ):
        assert (tmp_path / "model" / file).exists(), file
    assert (tmp_path / "samples_000002.png").exists()
