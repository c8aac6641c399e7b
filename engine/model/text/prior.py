"""The text prior: a diffusion transformer that predicts an SSL grid from a noisy one, a time and a text.

One token per cell of the grid, with its place on two axes; every block looks at the grid, then at the text. It predicts
clean vectors that are standardised per channel. It does not know files, pictures or words: a text is tokens (T, E) and
which of them count. Blocks and features of time are the CDM's (engine.model.cdm).
Source: Peebles & Xie 2023 (DiT, adaLN-zero); Ramesh et al. 2022 (a prior over embeddings, which predicts x0); Ho &
Salimans 2022 (one network with and without its condition).
"""

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from engine.model.cdm import Attention, FeedForward, TimeEmbedder, modulated, modulation
from engine.model.text.words import CrossAttention, WordTower, WordTowerConfig

TOKENS, WHOLE = "tokens", "whole"


@dataclass(frozen=True)
class TextPriorConfig:
    """Sizes of a prior, and what it was trained on."""

    ssl_dim: int
    """D, channels of the grid's vectors."""
    encoder: str
    """Name of the SSL encoder they are of."""
    encoder_digest: str | None = None
    """SHA-256 of its weights; None = not known."""
    tower: str = "words"
    """The text tower: "words" is the prior's own; others are named in engine.model.text.towers."""
    tower_digest: str | None = None
    """SHA-256 of the tower's weights; None for the prior's own."""
    text_dim: int = 96
    """E, channels of the tower's tokens."""
    reads: str = TOKENS
    """"tokens" of a text, or "whole": one vector of a text, where it has learned from vectors of pictures."""
    window: int = 16
    """Cells on each axis of the largest grid it was trained on; wider ones are sampled in windows."""
    width: int = 384
    layers: int = 12
    heads: int = 6

    def __post_init__(self) -> None:
        if self.reads not in (TOKENS, WHOLE) or (self.reads == WHOLE and self.tower == "words"):
            raise ValueError(
                f"a text prior reads tokens, or whole texts of a CLIP; got {self.reads!r} of {self.tower}."
            )
        for name in ("ssl_dim", "text_dim", "window", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"a text prior's {name} must be at least 1; got {getattr(self, name)}.")
        if self.width < 4 or self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"a text prior's width must be a multiple of 4 and of heads={self.heads}; got {self.width}."
            )


class TextBlock(nn.Module):
    """One block: the grid, the text, a feed-forward; each set by the time and the text as a whole (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.cross = CrossAttention(width, heads)
        self.mlp = FeedForward(width)
        self.adaLN_modulation = modulation(width, 9)

    def forward(self, tokens: Tensor, told: Tensor, text: Tensor, counts: Tensor) -> Tensor:
        parts = self.adaLN_modulation(told).chunk(9, dim=1)
        tokens = tokens + parts[2][:, None] * self.attn(modulated(tokens, parts[0], parts[1]))
        tokens = tokens + parts[5][:, None] * self.cross(modulated(tokens, parts[3], parts[4]), text, counts)
        return tokens + parts[8][:, None] * self.mlp(modulated(tokens, parts[6], parts[7]))


@dataclass(frozen=True)
class TextTokens:
    """Texts as the prior reads them."""

    tokens: Float[Tensor, "b t width"]
    counts: Bool[Tensor, "b t"]

    def rows(self, chosen: list[int]) -> "TextTokens":
        """Return these texts, in this order."""
        return TextTokens(self.tokens[chosen], self.counts[chosen])


class TextPrior(nn.Module):
    """Predict clean standardised grids `(B, D, h, w)`, h and w up to `window`, from noisy ones.

    With tower "words" it carries the tower, which is trained with it.
    """

    mean: Tensor
    spread: Tensor
    text_mean: Tensor
    """(E,), what is taken from a whole text; only where it reads those."""

    def __init__(self, config: TextPriorConfig, words: WordTowerConfig | None = None) -> None:
        """Raises: ValueError unless there is a vocabulary exactly where the tower is the prior's own."""
        super().__init__()
        if (words is None) == (config.tower == "words"):
            raise ValueError(f"a prior has a vocabulary if its tower is words; the tower is {config.tower!r}.")
        self.config, width = config, config.width
        self.register_buffer("mean", torch.zeros(config.ssl_dim))
        self.register_buffer("spread", torch.ones(config.ssl_dim))
        if config.reads == WHOLE:
            self.register_buffer("text_mean", torch.zeros(config.text_dim))
        self.words = None if words is None else WordTower(words)
        self.x_embedder = nn.Linear(config.ssl_dim, width)
        self.t_embedder = TimeEmbedder(width)
        self.text_embedder = nn.Linear(config.text_dim, width)
        self.whole_text = nn.Linear(width, width)
        self.nothing = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(TextBlock(width, config.heads) for _ in range(config.layers))
        self.final_modulation = modulation(width, 2)
        self.final = nn.Linear(width, config.ssl_dim)
        self._start()

    def _start(self) -> None:
        """Draw the weights as DiT does: every block begins as the identity and every prediction as the mean grid."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.nothing, std=0.02)
        zero = [module.adaLN_modulation[1] for module in self.modules() if isinstance(module, TextBlock)]
        for layer in (*zero, self.final_modulation[1], self.final):
            nn.init.zeros_(layer.weight)  # pyright: ignore[reportArgumentType]

    def read(
        self, text: Float[Tensor, "b t e"], counts: Bool[Tensor, "b t"], dropped: Bool[Tensor, " b"] | None = None
    ) -> TextTokens:
        """Return a tower's tokens as the blocks see them; texts that are `dropped` become the null text."""
        tokens = self.text_embedder(text)
        if dropped is not None:
            tokens = torch.where(dropped[:, None, None], self.nothing, tokens)
            first = torch.zeros_like(counts)
            first[:, 0] = True
            counts = torch.where(dropped[:, None], first, counts)
        return TextTokens(tokens, counts)

    def null(self, like: TextTokens) -> TextTokens:
        """Return the null text once, in the form of `like`."""
        counts = torch.zeros_like(like.counts[:1])
        counts[:, 0] = True
        return TextTokens(self.nothing.expand_as(like.tokens[:1]), counts)

    def forward(
        self, x: Float[Tensor, "b d h w"], t: Integer[Tensor, " b"], text: TextTokens
    ) -> Float[Tensor, "b d h w"]:
        """Return x0 of noisy grids (B, D, h, w) at times 0…999 (B,), one text for each."""
        _, channels, height, width = x.shape
        if channels != self.config.ssl_dim or max(height, width) > self.config.window:
            raise ValueError(
                f"grids for this prior must be (B, {self.config.ssl_dim}, h, w) of at most {self.config.window} cells "
                f"on a side; got {tuple(x.shape)}."
            )
        tokens = self.x_embedder(rearrange(x, "b d h w -> b (h w) d")) + self._places(height, width).to(x)
        weights = text.counts[..., None].to(text.tokens)
        whole = (text.tokens * weights).sum(1) / weights.sum(1)
        told = self.t_embedder(t) + self.whole_text(whole)
        for block in self.blocks:
            tokens = block(tokens, told, text.tokens, text.counts)
        shift, scale = self.final_modulation(told).chunk(2, dim=1)
        found = self.final(modulated(tokens, shift, scale))
        return rearrange(found, "b (h w) d -> b d h w", h=height)

    def _places(self, height: int, width: int) -> Tensor:
        """Return sines and cosines of rows and columns, half the width each: (h·w, width)."""
        half = self.config.width // 2
        rows, columns = (get_1d_sincos_pos_embed_from_grid(half, torch.arange(n)).float() for n in (height, width))
        both = (rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1))
        return torch.cat(both, dim=-1).flatten(0, 1)

    def standard(self, grids: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Return raw SSL vectors less their mean, over their spread."""
        return (grids - self.mean[:, None, None]) / self.spread[:, None, None]

    def restored(self, grids: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Return the raw SSL vectors whose `standard` form is given."""
        return grids * self.spread[:, None, None] + self.mean[:, None, None]
