"""The conditioning diffusion model (CDM): a 1-D diffusion transformer over the Summarizer's tokens.

It predicts a clean summary from a noisy one, the time and the magnification; the steps are engine.model.cdm_sampler'.
It does not know files, pictures or SSL vectors. Parameter names are those of the published checkpoints, so no table of
names is needed. diffusers' DiTTransformer2DModel is another network (patches on two axes, a time embedding per block,
split q, k and v), so the blocks are built from torch.nn; features of time and place are diffusers'. Source: ZoomLDM
(CVPR 2025), CDM; Peebles & Xie 2023, DiT with adaLN-zero.
"""

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid, get_timestep_embedding
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional

TIME_FEATURES = 256
"""Cosines and sines of a time, half each."""
TIMES = 1000
"""Times of training; the cosine schedule ("squaredcos_cap_v2") is the same for every CDM."""
_MLP_RATIO = 4
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class CDMConfig:
    """Sizes of a CDM, and which summaries it was trained on.

    `tokens`, `channels` and `magnifications` are those of the Summarizer it stands in for (65, 512 and 8 in the
    published BRCA model). `conditioner` is that Summarizer's digest (`cdm_store.conditioner_digest`); None = not known,
    as in the published files.
    """

    tokens: int = 65
    channels: int = 512
    magnifications: int = 8
    width: int = 768
    layers: int = 12
    heads: int = 12
    conditioner: str | None = None
    standardised: bool = False
    """Whether it works on summaries less their mean, over their spread, per magnification and entry. The published
    files have no such numbers. Entries vary by a tenth of their mean, which need not be learned first."""

    def __post_init__(self) -> None:
        for name in ("tokens", "channels", "magnifications", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"a CDM's {name} must be at least 1; got {getattr(self, name)}.")
        if self.width < 2 or self.width % 2 or self.width % self.heads:
            raise ValueError(f"a CDM's width must be even and a multiple of heads={self.heads}; got {self.width}.")


class Attention(nn.Module):
    """Let every token of `(B, T, width)` look at every other; q, k and v come from one matrix with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(tokens), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        seen = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(seen, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    """Two linear layers with a tanh-GELU between them, token by token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, _MLP_RATIO * width)
        self.fc2 = nn.Linear(_MLP_RATIO * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(tokens), approximate="tanh"))


def modulation(width: int, count: int) -> nn.Sequential:
    """Return the layer that turns what a block is told `(B, width)` into `count` vectors of that width."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


def modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise each token of `(B, T, width)` without weights of its own, then scale and shift by `(B, width)`."""
    normed = functional.layer_norm(tokens, tokens.shape[-1:], eps=_NORM_EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """One transformer block whose norms and residuals are set by time and magnification (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, tokens: Tensor, told: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(told).chunk(6, dim=1)
        tokens = tokens + gate_a[:, None] * self.attn(modulated(tokens, shift_a, scale_a))
        return tokens + gate_m[:, None] * self.mlp(modulated(tokens, shift_m, scale_m))


class TimeEmbedder(nn.Module):
    """Turn times `(B,)` into `(B, width)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        features = get_timestep_embedding(t, TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(features.to(next(self.mlp.parameters())))


class MagnificationEmbedder(nn.Module):
    """Turn magnification indices `(B,)` into `(B, width)`; the CDM has no class for "none"."""

    def __init__(self, magnifications: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(magnifications, width)

    def forward(self, magnification: Tensor) -> Tensor:
        return self.embedding_table(magnification)


class FinalLayer(nn.Module):
    """Read twice the channels from every token."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * channels)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, tokens: Tensor, told: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(told).chunk(2, dim=1)
        return self.linear(modulated(tokens, shift, scale))


class CDM(nn.Module):
    """Predict clean summaries `(B, T, C)` from noisy ones.

    `forward` returns (B, T, 2C): x0 of standardised summaries (`standard`), then the channels of a learned variance,
    which the published layout has. Sampling does not read them and training here (engine.training.cdm.train) does not
    teach them: with eta = 0 no variance is used. The published code holds tokens last, (B, C, T).
    """

    pos_embed: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self, config: CDMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        # Fixed, but part of the published files: a buffer, so that it is stored and not trained.
        places = get_1d_sincos_pos_embed_from_grid(width, torch.arange(config.tokens))
        self.register_buffer("pos_embed", places.float()[None])
        if config.standardised:
            for name, start in (("mean", torch.zeros), ("spread", torch.ones)):
                self.register_buffer(name, start(config.magnifications, config.tokens, config.channels))
        self.x_embedder = nn.Linear(config.channels, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = MagnificationEmbedder(config.magnifications, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.final_layer = FinalLayer(width, config.channels)
        self._start()

    def _start(self) -> None:
        """Draw the weights as DiT does: every block begins as the identity and every prediction as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            nn.init.normal_(layer.weight, std=0.02)  # pyright: ignore[reportArgumentType]
        modulations = [
            module.adaLN_modulation[1] for module in self.modules() if isinstance(module, Block | FinalLayer)
        ]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor, t: Tensor, magnification: Tensor) -> Float[Tensor, "b tokens channels"]:
        """Return x0 and variance channels (B, T, 2C) of noisy summaries `(B, T, C)` at times 0…999 `(B,)`."""
        if x.shape[1:] != (self.config.tokens, self.config.channels):
            wanted = (self.config.tokens, self.config.channels)
            raise ValueError(f"summaries for this CDM must be (B, {wanted[0]}, {wanted[1]}); got {tuple(x.shape)}.")
        tokens = self.x_embedder(x) + self.pos_embed
        told = self.t_embedder(t) + self.y_embedder(magnification)
        for block in self.blocks:
            tokens = block(tokens, told)
        return self.final_layer(tokens, told)

    def standard(
        self, summaries: Float[Tensor, "b t c"], magnification: Integer[Tensor, " b"]
    ) -> Float[Tensor, "b t c"]:
        """Return what the network sees of clean summaries (B, T, C), magnification indices (B,)."""
        if not self.config.standardised:
            return summaries
        return (summaries - self.mean[magnification]) / self.spread[magnification]

    def restored(self, x0: Float[Tensor, "b t c"], magnification: Integer[Tensor, " b"]) -> Float[Tensor, "b t c"]:
        """Return the summaries (B, T, C) whose `standard` form is x0."""
        return x0 * self.spread[magnification] + self.mean[magnification] if self.config.standardised else x0

    def predict_x0(self, x: Tensor, t: Tensor, magnification: Tensor) -> Tensor:
        """Return the clean standardised summaries (B, T, C) that `forward` predicts."""
        return self.forward(x, t, magnification)[..., : self.config.channels]
