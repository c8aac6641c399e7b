"""The bundle of a model: U-Net, autoencoder, conditioner and noise schedule, in one device and dtype.

Results have the caller's dtype; inside, the networks run in theirs. It does not know canvases or Ray.
Source: ZoomLDM (CVPR 2025). LDM's "linear" betas are the square of a linspace between square roots, which diffusers
calls "scaled_linear".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from engine.model.config import ConditionerConfig, ModelConfig, tiny_config
from engine.model.encoders.base import digest_of
from engine.model.networks import Networks, build_networks
from engine.model.unet_features import block_means, check_blocks
from engine.model.weights import folder as model_folder
from engine.model.weights import hub, ldm_import

__all__ = ["ConditionerConfig", "ModelConfig", "ZoomLDM", "digest", "tiny_config"]


class ZoomLDM(nn.Module):
    """A latent diffusion model conditioned on SSL grids and a magnification.

    `alphas_cumprod` and `betas` are float64 (1000,) on the CPU whatever the networks' dtype: a schedule rounded to
    bfloat16 has equal neighbours. `extras` holds named tensors that travel with the folder, e.g. "guidance/linear".

    >>> import engine
    >>> model = engine.ZoomLDM.from_pretrained("demo")
    >>> model.config.magnifications, model.alphas_cumprod.shape
    (('20x', '10x', '5x', '2.5x', '1.25x'), torch.Size([1000]))
    """

    def __init__(self, config: ModelConfig, networks: Networks | None = None) -> None:
        super().__init__()
        self.config = config
        parts = build_networks(config) if networks is None else networks
        self.unet, self.vae, self.conditioner = parts.unet, parts.vae, parts.conditioner
        start, end = config.beta_start**0.5, config.beta_end**0.5
        self.betas = torch.linspace(start, end, config.timesteps, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.extras: dict[str, dict[str, Tensor]] = {}
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        variant: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        weights: ldm_import.WeightsChoice = "ema",
    ) -> Self:
        """Load a model: "demo", a folder in the published or our layout, or a Hub id; `variant` is a folder in it.

        `weights` chooses between averaged and raw U-Net weights where a published file has both.
        Raises: CheckpointError saying what is missing or wrong and what to do.
        """
        read = ldm_import.read(hub.locate(source, variant), weights)
        # Built without memory, then given the tensors: no random initialisation, no second copy on the device.
        model = cls(read.config, build_networks(read.config, "meta"))
        for part, network in model.networks.named().items():
            state = read.networks[part]
            wide = {name: torch.float32 if name == model_folder.CODEBOOK else dtype for name in state}
            placed = {name: tensor.to(device, wide[name], copy=True) for name, tensor in state.items()}
            network.load_state_dict(placed, assign=True)
        model.extras = read.extras
        return model.to(dtype=dtype)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write our layout, extras included; atomically, replacing an earlier model but nothing else.

        `dtype` casts what is stored (the codebook stays float32); None stores the weights as they are.
        """
        model_folder.write_folder(Path(folder), self.as_weights(), dtype)

    def as_weights(self) -> model_folder.Weights:
        """Return config, state dicts and extras, sharing memory with the model."""
        states = {part: dict(network.state_dict()) for part, network in self.networks.named().items()}
        return model_folder.Weights(self.config, states, self.extras)

    @property
    def networks(self) -> Networks:
        """The three networks, by subfolder name through `.named()`."""
        return Networks(self.unet, self.vae, self.conditioner)

    @property
    def device(self) -> torch.device:
        """Where the networks are; the schedule stays on the CPU."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return self.unet.conv_in.weight.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast as nn.Module.to, but keep the codebook in float32 or wider.

        A code is chosen by distance; at 8192 codes of width 3, neighbours are closer than bfloat16 resolves.
        """
        codebook = self.vae.quantize.embedding.weight.detach()
        super().to(*args, **kwargs)
        weight = self.vae.quantize.embedding.weight
        if weight.dtype.itemsize < 4:
            weight.data = codebook.to(weight.device, torch.float32)
        return self

    def channels_last(self) -> Self:
        """Lay out U-Net and autoencoder NHWC, which tensor cores prefer; the last digits of results change."""
        self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h//4 w//4"]:
        """Encode `(B, 3, 256, 256)` in [−1, 1] to latents `(B, 3, 64, 64)`, before the codebook."""
        network = self.vae.encoder.conv_in.weight
        latents = self.vae.encode(images.to(network.device, network.dtype), return_dict=False)[0]
        return latents.to(images.dtype) * self.config.scale_factor

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 4*h 4*w"]:
        """Decode latents `(B, 3, 64, 64)` through the codebook to `(B, 3, 256, 256)` in about [−1, 1], unclamped."""
        network = self.vae.decoder.conv_in.weight
        codes = quantise(latents / self.config.scale_factor, self.vae.quantize.embedding.weight)
        images = self.vae.decode(codes.to(network.device, network.dtype), force_not_quantize=True, return_dict=False)[0]
        return images.to(latents.dtype)

    def summarize(self, grids: Sequence[Tensor], magnifications: Sequence[int]) -> Float[Tensor, "b t c"]:
        """Turn raw SSL grids `(D, h, w)` of any sizes and magnification indices into context `(B, T, C)`.

        Pools and standardises first; `conditioner` itself takes what `conditioner.prepare` returns.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        cells = [self.conditioner.prepare(grid.to(self.device, wide)) for grid in grids]
        return self.conditioner(cells, magnifications)

    def null_context(self, batch: int) -> Float[Tensor, "{batch} t c"]:
        """Return the context `(B, T, C)` of "no condition"."""
        return self.conditioner.null(batch)

    def predict_eps(
        self, x_t: Float[Tensor, "b c h w"], t: int | Tensor, context: Float[Tensor, "b t d"], w: float
    ) -> Float[Tensor, "b c h w"]:
        """Predict the noise in `x_t` (B, 3, h, w): (1 + w)·eps(context) − w·eps(null).

        `t` is the network's time argument, one for all or `(B,)`. With w = 0 the null context is not evaluated;
        otherwise both go through the network in ONE call of 2B.
        """
        batch, weight = x_t.shape[0], self.unet.conv_in.weight
        sample = x_t.to(weight.device, weight.dtype)
        time = torch.as_tensor(t, device=weight.device).expand(batch)
        tokens = context.to(weight.device, weight.dtype)
        if w == 0:
            return self._as_eps(self._network(sample, time, tokens).to(x_t), x_t, time)
        null = self.null_context(batch).to(tokens)
        both = self._network(sample.repeat(2, 1, 1, 1), time.repeat(2), torch.cat([tokens, null]))
        cond, uncond = both.to(x_t).chunk(2)
        return self._as_eps((1 + w) * cond - w * uncond, x_t, time)

    def features(
        self, x_t: Float[Tensor, "b c h w"], t: int | Tensor, context: Float[Tensor, "b t d"], blocks: Sequence[str]
    ) -> Float32[Tensor, "b width"]:
        """Return the spatial means of U-Net activations at `x_t` (B, 3, h, w): float32 (B, ΣC), blocks side by side.

        `blocks` are names of `activations.block_widths`; what comes after the last of them is not computed.
        Raises: ValueError for an unknown block.
        """
        check_blocks(self.config, blocks)
        weight = self.unet.conv_in.weight
        time = torch.as_tensor(t, device=weight.device).expand(x_t.shape[0])
        sample, tokens = x_t.to(weight.device, weight.dtype), context.to(weight.device, weight.dtype)
        return block_means(self.unet, blocks, sample, time, tokens)

    def _as_eps(self, output: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Turn the network's output into noise: itself, or √ᾱ·v + √(1 − ᾱ)·x_t for v-prediction."""
        if self.config.prediction_type == "epsilon":
            return output
        index = time.round().long().clamp(0, self.config.timesteps - 1).cpu()
        alpha_bar = self.alphas_cumprod[index].to(x_t)[:, None, None, None]
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * x_t

    def x0_from_eps(
        self, x_t: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"], alpha_bar: float
    ) -> Float[Tensor, "b c h w"]:
        """Return the clean latents that `x_t` and `eps` imply: (x_t − √(1 − ᾱ)·eps)/√ᾱ; not clipped."""
        return (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5

    def _network(self, sample: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(sample, time, encoder_hidden_states=tokens, return_dict=False)[0]


def digest(model: ZoomLDM | str | Path) -> str:
    """Return the SHA-256 of a model's config and weights; equal for a folder and the float32 model loaded from it."""
    weights = model.as_weights() if isinstance(model, ZoomLDM) else ldm_import.read(hub.locate(model))
    return model_folder.digest(weights)


def autoencoder_digest(model: ZoomLDM) -> str:
    """Return the SHA-256 of a model's autoencoder alone: latents of equal digests mean the same.

    It is that of the weights in float32: load the model so, whatever it computes in.
    """
    return digest_of(model.vae.state_dict())


def quantise(latents: Float[Tensor, "b k h w"], codebook: Float[Tensor, "n k"]) -> Float[Tensor, "b k h w"]:
    """Replace each latent pixel of `(B, K, h, w)` by its nearest code of `(N, K)`; gradients pass straight through.

    Returns float32, or float64 for float64 latents. Distances are summed from differences, channel by channel, rather
    than by cdist: its matrix product cancels digits and would follow a TF32 setting. One picture at a time bounds
    the table to h·w·N floats (134 MB at 64×64 and 8192 codes) and makes the result independent of the batch.
    """
    wide = latents.to(codebook.device, torch.promote_types(latents.dtype, torch.float32))
    codes = codebook.to(wide.dtype)
    chosen = torch.empty_like(wide)
    with torch.no_grad():
        for picture, out in zip(wide, chosen, strict=True):
            pixels = picture.flatten(1)
            distance = pixels.new_zeros(pixels.shape[1], codes.shape[0])
            for channel in range(codes.shape[1]):
                distance += (pixels[channel, :, None] - codes[None, :, channel]).square_()
            out.copy_(codes[distance.argmin(dim=1)].T.reshape(picture.shape))
    return wide + (chosen - wide).detach()
