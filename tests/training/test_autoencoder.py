"""Standardising latents changes their scale and nothing a user sees; crops depend on seed and step only."""

import numpy as np
import torch
from diffusers import VQModel

from engine.model.config import vae_arguments
from engine.training.demo.autoencoder import (
    PLAIN,
    Crops,
    PlainAutoencoder,
    fold_standardisation,
    lloyd_codebook,
    picture_loss,
    plain_loss,
)
from engine.training.demo.data import Regions
from engine.training.pictures import psnr
from engine.training.settings import AutoencoderSettings

SHARES = (0.4, 0.2, 0.2, 0.2)


def tiny_vae() -> VQModel:
    torch.manual_seed(0)
    vae = VQModel(**vae_arguments((8, 8, 8), 1, codes=32), norm_num_groups=4, mid_block_add_attention=False)
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    return vae.double().eval()


@torch.no_grad()
def test_folding_standardises_latents_and_leaves_the_plain_picture() -> None:
    vae, images = tiny_vae(), torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    latents = vae.encode(images).latents
    before = vae.decode(latents, force_not_quantize=True).sample
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    fold_standardisation(vae, mean, std)
    folded = vae.encode(images).latents
    new_std, new_mean = torch.std_mean(folded, dim=(0, 2, 3))
    assert torch.allclose(new_mean, torch.zeros_like(mean), atol=1e-9)
    assert torch.allclose(new_std, torch.ones_like(std))
    assert torch.allclose(vae.decode(folded, force_not_quantize=True).sample, before)


@torch.no_grad()
def test_folding_one_scale_for_all_channels_leaves_the_quantised_picture() -> None:
    """With one scale the nearest code stays the nearest, so the codebook must have moved along."""
    vae, images = tiny_vae(), torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    before = vae.decode(vae.encode(images).latents).sample
    one = torch.ones(3, dtype=torch.float64)
    fold_standardisation(vae, torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64), 0.4 * one)
    assert torch.allclose(vae.decode(vae.encode(images).latents).sample, before)


def test_crops_are_a_function_of_seed_stage_and_step(regions: Regions) -> None:
    crops = Crops(regions, 64, seed=3)
    assert torch.equal(crops.batch(PLAIN, 7, 3, SHARES), Crops(regions, 64, seed=3).batch(PLAIN, 7, 3, SHARES))
    assert not torch.equal(crops.batch(PLAIN, 7, 3, SHARES), crops.batch(PLAIN, 8, 3, SHARES))
    assert not torch.equal(crops.batch(PLAIN, 7, 3, SHARES), Crops(regions, 64, seed=4).batch(PLAIN, 7, 3, SHARES))


def test_codebook_finds_clusters_and_uses_every_code() -> None:
    rng = np.random.default_rng(0)
    centres = torch.tensor([[-5.0, 0, 0], [5, 0, 0], [0, 5, 0]])
    points = centres.repeat(200, 1) + 0.1 * torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    codes = lloyd_codebook(points, 3, 20, rng)
    assert torch.cdist(centres, codes).min(1).values.max() < 5.1
    assert len(torch.cdist(points, codes).argmin(1).unique()) == 3


def test_plain_loss_reaches_every_parameter() -> None:
    model = PlainAutoencoder(tiny_vae().float())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    loss, _ = plain_loss(model, images, torch.randn(2, 3, 8, 8), AutoencoderSettings(), bfloat16=False)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_picture_loss_and_psnr_of_known_errors() -> None:
    wanted = torch.zeros(1, 3, 4, 4)
    assert float(picture_loss(wanted + 0.5, wanted, gradient_weight=1.0)) == 0.75
    assert psnr(0.04) == 20.0
