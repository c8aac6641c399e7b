"""Denoiser and Summarizer together on a prepared set: what they learn, from which weights, and what is written.

It does not know optimisers, Ray nor command lines.
Source: ZoomLDM (CVPR 2025); Large-Image-Diffusion (CVPR 2024) for one token.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.core.errors import PreparedMismatchError
from engine.core.runtime import choose_device
from engine.core.units import LATENT_CHANNELS, TILE_LATENT_PX
from engine.datasets.dataset import PreparedSet
from engine.model.config import ConditionerConfig, ModelConfig, unet_arguments, vae_arguments
from engine.model.summarizer import GRID_SIDE
from engine.model.weights.ldm_export import ldm_config, write_ldm
from engine.model.weights.training_slides import write_training_slides
from engine.model.zoomldm import ZoomLDM, autoencoder_digest
from engine.training.batches import DenoiserPart, PatchSource, Sample, draw_samples, read_part
from engine.training.denoiser.initial_weights import load_part
from engine.training.denoiser.loss import DenoiserNetworks, noise_shares, noisy_latents, squared_errors, wanted_output
from engine.training.denoiser.position_pretraining import AttentionWatch, look_up_losses, look_up_share
from engine.training.denoiser.position_start import start_with_places
from engine.training.denoiser.settings import JointConfig, LearningConfig, NetworkSettings
from engine.training.denoiser.validation import eps_errors, save_samples
from engine.training.gradients import Group
from engine.training.metrics_log import band_names, band_of
from engine.training.optimisation import Optimisation, TrainingError
from engine.training.trainer import ALONE, DTYPES, Learning, keys_of, need_checkpoint

STEM = "denoiser"


def network_config(settings: NetworkSettings) -> ModelConfig:
    """Return the model that a configuration describes."""
    channels = settings.unet_channels
    attention = (False,) + (True,) * (len(channels) - 1)
    unet = unet_arguments(channels, attention, heads=1, layers=settings.unet_layers, context=settings.context)
    vae = vae_arguments(settings.vae_channels, settings.vae_layers, settings.codes)
    vae |= {} if settings.vae_attention else {"mid_block_add_attention": False}
    groups = {} if settings.groups == 32 else {"norm_num_groups": settings.groups}
    return ModelConfig(
        magnifications=settings.magnifications,
        base_mpp=settings.base_mpp,
        ssl_dim=settings.ssl_dim,
        encoder=settings.encoder,
        conditioner=ConditionerConfig(
            kind=settings.conditioner,
            output_dim=settings.context,
            width=settings.summarizer_width,
            layers=settings.summarizer_layers,
            heads=settings.summarizer_heads,
            mlp=settings.summarizer_mlp,
        ),
        unet=unet | groups,
        vae=vae | groups,
        prediction_type=settings.prediction_type,
    )


def build_model(config: LearningConfig) -> ZoomLDM:
    """Return the model with its initial weights, float32 on the CPU.

    Raises: CheckpointError, also when `output.ldm` is asked for and cannot express this model: now, not after weeks.
    """
    initial = config.initial
    if initial.model is not None:
        model = ZoomLDM.from_pretrained(initial.model, initial.variant)
    else:
        torch.manual_seed(config.seed)
        model = ZoomLDM(network_config(config.model))
    if config.output.ldm is not None:
        ldm_config(model.config)
    if initial.unet is not None:
        load_part(model.unet, "unet", initial.unet, model.config)
    if initial.vae is not None:
        load_part(model.vae, "vae", initial.vae, model.config)
    if initial.conditioner is not None:
        load_part(model.conditioner, "conditioner", initial.conditioner, model.config)
    return model


def open_source(data: PreparedSet, model: ModelConfig) -> PatchSource:
    """Return the set's patches for a model. Raises: PreparedMismatchError naming what it was prepared otherwise for."""
    single = model.conditioner.kind == "token"
    expected: dict[str, Any] = {
        "encoder": model.encoder, "ssl_dim": model.ssl_dim, "base_mpp": model.base_mpp,
        "scale_factor": model.scale_factor, "latent_shape": (LATENT_CHANNELS, TILE_LATENT_PX, TILE_LATENT_PX),
    }  # fmt: skip
    data.require(**(expected if single else expected | {"magnifications": model.magnifications}))
    if single and model.magnifications[0] != data.magnifications[0]:
        raise PreparedMismatchError(
            f"a token conditioner takes one cell per patch, so it is trained at the set's base, "
            f"{data.magnifications[0]}; model.magnifications is {model.magnifications[0]}."
        )
    return PatchSource(data, model.magnifications, side=1 if single else GRID_SIDE)


class DenoiserLesson:
    """U-Net and conditioner learn to denoise the set's latents; the autoencoder stays as it is."""

    def __init__(self, config: JointConfig, writes: bool = True) -> None:
        """`writes` is False for all workers of a group but one. Raises: PreparedError or CheckpointError for what does
        not fit together."""
        self.config, self.stem, self.device = config, STEM, torch.device(choose_device(config.device, "device"))
        data = PreparedSet(config.data)
        self.model = build_model(config)
        self.source = open_source(data, self.model.config)
        data.require(autoencoder_digest=autoencoder_digest(self.model))
        self.heldout = self._open_heldout()
        self.chances = self.source.weights(config.train.magnification_weights)
        self.counts = [self.source.count(level) for level in range(len(self.chances))]
        self.keys = keys_of(
            config.train, seed=config.seed, precision=config.precision, initial=asdict(config.initial),
            places=asdict(config.places), model=self.model.config.to_json(), data=data.digest,
        )  # fmt: skip
        self.sets: dict[str, Sequence[str]] = {"loss_at": self.source.names, "loss_t": band_names()}
        self.model.requires_grad_(True).vae.requires_grad_(False)
        self.networks = DenoiserNetworks(self.model.to(self.device)).train()
        self.model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.train.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        self.alphas_cumprod = self.model.alphas_cumprod.to(self.device)
        self.watch = self._begin_with_places(writes) if config.places.token_steps else None

    def _open_heldout(self) -> PatchSource | None:
        """Raises: PreparedMismatchError or TrainingError for a set that cannot be measured on."""
        folder = self.config.heldout.data
        if folder is None:
            return None
        data = PreparedSet(folder)
        data.require(autoencoder_digest=autoencoder_digest(self.model))
        if data.digest == self.source.data.digest:
            raise TrainingError(
                f"heldout.data must hold other slides than data; {folder} holds the same. Prepare a set of its own."
            )
        return open_source(data, self.model.config)

    def _begin_with_places(self, writes: bool) -> AttentionWatch:
        """Teach the networks where cells lie, and return what hears their attention while that is kept up."""
        places = self.config.places
        even = replace(self.config.train, batch_size=places.batch_size, drop_condition=0.0)
        chances = (self.chances > 0) / np.count_nonzero(self.chances)

        def patches(seed: int, step: int) -> DenoiserPart:
            samples = draw_samples(chances, self.counts, even, (seed, step))
            return read_part(self.source, samples, (seed, step), self.networks.conditioner.prepare)

        kept = Path(self.config.run) / "places.pt"
        keys = self.keys | {"train": {}, "chances": chances.tolist()}  # rate and steps have no part in it
        dtype = DTYPES[self.config.precision]
        start_with_places(self.model, patches, places, self.config.seed, kept, dtype, keys, writes)
        return AttentionWatch(self.model.unet)

    def draw(self, step: int) -> list[Sample]:
        return draw_samples(self.chances, self.counts, self.config.train, (self.config.seed, step))

    def read(self, samples: Sequence[Sample], step: int) -> DenoiserPart:
        return read_part(self.source, samples, (self.config.seed, step), self.networks.conditioner.prepare)

    def losses(self, call: Callable[..., Any], part: DenoiserPart) -> tuple[Tensor, dict[str, list[int]]]:
        x0, noise, times = (v.to(self.device, non_blocking=True) for v in (part.x0, part.noise, part.times))
        shares = noise_shares(self.alphas_cumprod, times)
        x_t = noisy_latents(shares, x0, noise)
        cells = [cell.to(self.device, non_blocking=True) for cell in part.cells]
        dropped, dtype = part.dropped.to(self.device), DTYPES[self.config.precision]
        weight = look_up_share(self.config.places, part.step) if self.watch else 0.0
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32), ExitStack() as stack:
            heard = stack.enter_context(self.watch.listening()) if self.watch and weight else None
            output = call(x_t, times, cells, part.levels, dropped)
        wanted = wanted_output(self.model.config.prediction_type, shares, x0, noise)
        losses = squared_errors(output.float() - wanted, self.config.train.coarse_weights)
        if heard is not None:
            losses = losses + weight * look_up_losses(heard, cells, dropped)
        return losses, {"loss_at": part.levels, "loss_t": [band_of(sample.time) for sample in part.samples]}

    def name(self, sample: Sample) -> str:
        return f"{self.source.name(sample.level, sample.patch)} at t={sample.time}"

    def write(self, run: Optimisation) -> dict[str, Any]:
        output = self.config.output
        self.model.save_pretrained(output.folder, dtype=DTYPES[output.dtype])
        write_training_slides(Path(output.folder), self.source.data.slides, self.config.initial.sources)
        if output.ldm is not None:
            raw = {n.removeprefix("unet."): v for n, v in run.average.values.items() if n.startswith("unet.")}
            write_ldm(Path(output.ldm), self.model.as_weights(), raw, self.config.train.ema, run.step)
        return {"patches": dict(zip(self.source.names, self.counts, strict=True)), **self._measure()}

    def _measure(self) -> dict[str, Any]:
        """Measure the networks as they are on the held-out set, if there is one, and show samples of it."""
        settings, dtype = self.config.heldout, DTYPES[self.config.precision]
        if self.heldout is None:
            return {}
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            errors = eps_errors(self.model, self.heldout, settings.patches)
            if settings.samples:
                save_samples(Path(self.config.run) / "samples.png", self.model, self.heldout, settings)
        return {"heldout_eps_mse": errors}


def train(config: JointConfig, group: Group = ALONE) -> None:
    """Train, or continue, and write the model. Raises: EngineError."""
    torch.set_num_threads(config.threads)
    Learning(config, DenoiserLesson(config, writes=group.rank == 0), config.train, group).run()


def export(config: JointConfig) -> None:
    """Write the model of the last checkpoint. Raises: TrainingError if there is none."""
    need_checkpoint(config, STEM)
    Learning(config, DenoiserLesson(config), config.train, ALONE).export()
