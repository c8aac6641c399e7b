"""The VQ f4 autoencoder: plain, then standardised, then a codebook, then a decoder that lives with it.

Invariant: latents have mean 0 and deviation 1 per channel over the training tiles, and folding that into the 1×1
convolutions leaves decode(encode(x)) as it was. It does not know the denoiser. The encoder is frozen before the
codebook is made, so the codes are k-means of its latents and no commitment term is needed.
Source: latent diffusion, Rombach et al. 2022 (VQ f4); the codebook by Lloyd's k-means.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from engine.training.demo.data import Regions, Tile
from engine.training.optimisation import step_rng
from engine.training.pictures import as_images, psnr
from engine.training.settings import AutoencoderSettings

PLAIN, QUANTISED = 1, 2
"""Stage numbers: they keep the random streams of the stages apart."""


class Crops:
    """Random square crops of the training regions at every magnification; a pure function of (seed, stage, step)."""

    def __init__(self, regions: Regions, crop_px: int, seed: int) -> None:
        self.regions, self.crop_px, self.seed = regions, crop_px, seed

    def batch(self, stage: int, step: int, size: int, shares: Sequence[float]) -> Tensor:
        """Return float32 (size, 3, crop, crop) in [-1, 1], turned and mirrored at random."""
        rng = step_rng(self.seed, stage, step)
        chances = np.array(shares) / sum(shares)
        return as_images([self._crop(rng, chances) for _ in range(size)])

    def _crop(self, rng: np.random.Generator, chances: np.ndarray) -> np.ndarray:
        level = int(rng.choice(len(chances), p=chances))
        pixels = self.regions.pixels(int(rng.integers(len(self.regions.folders))), level)
        y, x = (int(rng.integers(size - self.crop_px + 1)) for size in pixels.shape[:2])
        crop = np.rot90(pixels[y : y + self.crop_px, x : x + self.crop_px], int(rng.integers(4)))
        return np.ascontiguousarray(crop[:, ::-1] if rng.integers(2) else crop)


class PlainAutoencoder(nn.Module):
    """The autoencoder without its codebook, and a linear map from latents to mean colours.

    The map makes latents follow the local colour, which the guidance between magnifications leans on.
    """

    def __init__(self, vae: VQModel) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.colour = nn.Conv2d(vae.config["vq_embed_dim"], 3, 1)

    def latents(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def images(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


class QuantisedDecoder(nn.Module):
    """The two parts of the autoencoder that are trained once the codebook stands."""

    def __init__(self, vae: VQModel) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder


def picture_loss(made: Tensor, wanted: Tensor, gradient_weight: float) -> Tensor:
    """Return L1 + L2 of the pixels + L1 of their first differences (float32 scalar)."""
    error = made.float() - wanted
    loss = error.abs().mean() + error.square().mean()
    slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return loss + gradient_weight * slopes


def plain_loss(
    model: PlainAutoencoder, images: Tensor, noise: Tensor, settings: AutoencoderSettings, bfloat16: bool
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of one batch without the codebook.

    Noise on the latents only means something while their scale is held, hence the two moment terms.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        z = model.latents(images).float()
        made = model.images(z + settings.latent_noise * noise)
    mean, var = z.mean(dim=(0, 2, 3)), z.var(dim=(0, 2, 3))
    moments = mean.square().mean() + (var - 1).square().mean()
    colour = (model.colour(z) - F.avg_pool2d(images, images.shape[2] // z.shape[2])).square().mean()
    loss = picture_loss(made, images, settings.gradient_weight)
    total = loss + 0.05 * moments + settings.colour_weight * colour
    mse = float((made.detach().float() - images).square().mean())
    return total, {"psnr": psnr(mse), "colour_mse": float(colour.detach())}


def quantised_loss(
    vae: VQModel, images: Tensor, noise: Tensor, settings: AutoencoderSettings, bfloat16: bool
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of one batch behind the codebook; only the decoder gets gradients."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        with torch.no_grad():
            z = vae.quant_conv(vae.encoder(images)).float()
            z = vae.quantize(z + 0.5 * settings.latent_noise * noise)[0]
        made = vae.decoder(vae.post_quant_conv(z))
    mse = float((made.detach().float() - images).square().mean())
    return picture_loss(made, images, settings.gradient_weight), {"psnr": psnr(mse)}


@torch.no_grad()
def encode_tiles(
    vae: VQModel, regions: Regions, level: int, tiles: Sequence[Tile], device: str, bfloat16: bool
) -> np.ndarray:
    """Return the latents of tiles before the codebook: float16 (N, 3, 64, 64)."""
    found = []
    for start in range(0, len(tiles), 4):
        images = as_images([regions.picture(tile, level) for tile in tiles[start : start + 4]]).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            z = vae.quant_conv(vae.encoder(images))
        found.append(z.float().cpu().numpy().astype(np.float16))
    return np.concatenate(found)


@torch.no_grad()
def fold_standardisation(vae: VQModel, mean: Tensor, std: Tensor) -> None:
    """Make latents (z − mean) / std by changing the 1×1 convolutions around them and the codebook.

    decode(encode(x)) stays as it was; mean and std are (C,).
    """
    before, after = vae.quant_conv, vae.post_quant_conv
    assert before.bias is not None  # VQModel builds both with a bias; this is for the type checker
    assert after.bias is not None
    before.weight.div_(std[:, None, None, None])
    before.bias.sub_(mean).div_(std)
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.mul_(std[None, :, None, None])
    codes = vae.quantize.embedding.weight
    codes.copy_((codes - mean) / std)


@torch.no_grad()
def lloyd_codebook(points: Tensor, codes: int, iterations: int, rng: np.random.Generator) -> Tensor:
    """Return k-means centres (codes, C) of points (N, C); a centre without points moves to a random point."""
    centres = points[torch.from_numpy(rng.choice(len(points), codes, replace=False))].clone()
    for _ in range(iterations):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in points.split(8192)])
        count = torch.bincount(nearest, minlength=codes)
        centres = torch.zeros_like(centres).index_add_(0, nearest, points) / count.clamp(min=1)[:, None]
        empty = torch.nonzero(count == 0)[:, 0]
        centres[empty] = points[torch.from_numpy(rng.choice(len(points), len(empty), replace=False))]
    return centres


@torch.no_grad()
def heldout_psnr(
    vae: VQModel, regions: Regions, tiles: list[list[Tile]], device: str, bfloat16: bool
) -> dict[str, float]:
    """Return dB of decode(encode(x)) through the codebook, per magnification."""
    figures = {}
    for level, name in enumerate(regions.scale.names):
        total = 0.0
        for tile in tiles[level]:
            images = as_images([regions.picture(tile, level)]).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                made = vae.decode(vae.encode(images).latents.float(), return_dict=False)[0]
            total += float((made.float().clamp(-1, 1) - images).square().mean())
        figures[name] = round(psnr(total / len(tiles[level])), 2)
    return figures
