"""The VQ autoencoder on the images of a prepared set, from random or given weights.

The loss is the pixels' L1 and L1 of their first differences, plus codebook and commitment terms. The published
autoencoder was also trained with a perceptual loss and a discriminator, which give sharper texture than an L1 can;
those networks are not part of this project. It does not know optimisers, Ray nor command lines.
Source: van den Oord et al. 2017 (codebook and commitment); Rombach et al. 2022 (VQ f4).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from engine.core.errors import PreparedError
from engine.core.runtime import choose_device
from engine.core.units import TILE_PX
from engine.datasets.dataset import PreparedSet
from engine.model.config import ModelConfig
from engine.model.weights.ldm_export import write_ldm
from engine.model.weights.training_slides import write_training_slides
from engine.training.autoencoder.settings import VQConfig
from engine.training.batches import TIMES, PatchSource, Sample
from engine.training.denoiser.train import build_model
from engine.training.gradients import Group
from engine.training.optimisation import Optimisation, step_rng
from engine.training.pictures import as_images, psnr
from engine.training.trainer import ALONE, DTYPES, Learning, keys_of, need_checkpoint

STEM = "autoencoder"
CROPS, TURNS = 12, 13
"""Stage numbers: they keep the random streams of draws and of crops apart."""


class AutoencoderNetworks(nn.Module):
    """Encoder, codebook and decoder; the code is chosen in float32 whatever the rest computes in."""

    def __init__(self, vae: VQModel) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is decoded of `(B, 3, s, s)`, and codebook plus commitment loss (scalar)."""
        latents = self.vae.quant_conv(self.vae.encoder(images))
        with torch.autocast("cpu" if images.is_meta else images.device.type, enabled=False):
            codes, commitment, _ = self.vae.quantize(latents.float())
        return self.vae.decoder(self.vae.post_quant_conv(codes)), commitment


@dataclass(frozen=True)
class Crops:
    """What one worker computes at once: crops `(B, 3, s, s)` in [-1, 1]."""

    samples: Sequence[Sample]
    images: Tensor

    def pinned(self) -> "Crops":
        """Return it in page-locked memory, from which copies to a GPU do not wait."""
        return Crops(self.samples, self.images.pin_memory())


def open_images(data: PreparedSet, model: ModelConfig) -> PatchSource:
    """Return the set's patches, at all of its magnifications. Raises: PreparedError without images;
    PreparedMismatchError for a set of another domain: the slides are to be prepared again with this model's facts.
    """
    if not data.has_images:
        raise PreparedError(
            f"{data.folder} must hold images to train an autoencoder on; it was prepared without --keep_images. "
            "Prepare the slides again with it."
        )
    # An autoencoder does not ask how coarse a set goes, so names are compared as far as both have them.
    known = model.magnifications[: len(data.magnifications)]
    known += data.magnifications[len(known) :]
    data.require(encoder=model.encoder, ssl_dim=model.ssl_dim, base_mpp=model.base_mpp, magnifications=known)
    return PatchSource(data, data.magnifications, side=1)


class AutoencoderLesson:
    """Encoder, codebook and decoder learn to give patches back."""

    def __init__(self, config: VQConfig) -> None:
        """Raises: PreparedError or CheckpointError for what does not fit together."""
        self.config, self.stem, self.device = config, STEM, torch.device(choose_device(config.device, "device"))
        self.model = build_model(config)
        self.source = open_images(PreparedSet(config.data), self.model.config)
        self.chances = self.source.weights(config.train.magnification_weights)
        self.model.extras.clear()  # fitted to the autoencoder that was
        self.networks = AutoencoderNetworks(self.model.to(self.device).vae).train()
        self.keys = keys_of(
            config.train, seed=config.seed, precision=config.precision, initial=asdict(config.initial),
            model=self.model.config.vae, data=self.source.data.digest,
        )  # fmt: skip
        self.sets: dict[str, Sequence[str]] = {"loss_at": self.source.names}

    def draw(self, step: int) -> list[Sample]:
        rng, size = step_rng(self.config.seed, CROPS, step), self.config.train.batch_size
        levels = rng.choice(len(self.chances), size=size, p=self.chances)
        indexes = [int(rng.integers(self.source.count(level))) for level in levels]
        return [
            Sample(int(at), index, TIMES, False, n) for n, (at, index) in enumerate(zip(levels, indexes, strict=True))
        ]

    def read(self, samples: Sequence[Sample], step: int) -> Crops:
        return Crops(samples, as_images([self._crop(sample, step) for sample in samples]))

    def _crop(self, sample: Sample, step: int) -> np.ndarray:
        rng = np.random.default_rng(np.random.SeedSequence((self.config.seed, TURNS, step, sample.number)))
        picture, side = self.source.data.image(sample.level, sample.patch), self.config.train.crop_px
        y, x = (int(rng.integers(TILE_PX - side + 1)) for _ in range(2))
        crop = np.rot90(picture[y : y + side, x : x + side], int(rng.integers(4)))
        return np.ascontiguousarray(crop[:, ::-1] if rng.integers(2) else crop)

    def losses(self, call: Callable[..., Any], part: Crops) -> tuple[Tensor, dict[str, list[int]]]:
        images = part.images.to(self.device, non_blocking=True)
        dtype, settings = DTYPES[self.config.precision], self.config.train
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            made, commitment = call(images)
        error = made.float() - images
        losses = error.abs().mean(dim=(1, 2, 3)) + settings.codebook_weight * commitment
        for axis in (2, 3):
            losses = losses + settings.gradient_weight * error.diff(dim=axis).abs().mean(dim=(1, 2, 3))
        return losses, {"loss_at": [sample.level for sample in part.samples]}

    def name(self, sample: Sample) -> str:
        return self.source.name(sample.level, sample.patch)

    def write(self, run: Optimisation) -> dict[str, Any]:
        """Write a whole model around the autoencoder; its other networks are as they began, and not for its latents."""
        output, weights = self.config.output, self.model.as_weights()
        self.model.save_pretrained(output.folder, dtype=DTYPES[output.dtype])
        write_training_slides(Path(output.folder), self.source.data.slides, self.config.initial.sources)
        if output.ldm is not None:
            write_ldm(Path(output.ldm), weights, weights.networks["unet"], self.config.train.ema, run.step)
        return {"psnr_db": self.fidelity()}

    @torch.no_grad()
    def fidelity(self, patches: int = 8) -> dict[str, float]:
        """Return dB of decode(encode(x)) on the first patches of each magnification; they may have been trained on."""
        figures = {}
        for level, name in enumerate(self.source.names):
            count = min(patches, self.source.count(level))
            pictures = [self.source.data.image(level, i) for i in range(count)]
            if pictures:
                images = as_images(pictures).to(self.device)
                mse = float((self.networks(images)[0].clamp(-1, 1) - images).square().mean())
                figures[name] = round(psnr(mse), 2)
        return figures


def train(config: VQConfig, group: Group = ALONE) -> None:
    """Train, or continue, and write the autoencoder. Raises: EngineError."""
    torch.set_num_threads(config.threads)
    Learning(config, AutoencoderLesson(config), config.train, group).run()


def export(config: VQConfig) -> None:
    """Write the autoencoder of the last checkpoint. Raises: TrainingError if there is none."""
    need_checkpoint(config, STEM)
    Learning(config, AutoencoderLesson(config), config.train, ALONE).export()
