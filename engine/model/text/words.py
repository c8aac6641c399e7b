"""A word-level text tower: a vocabulary, and a small transformer that is trained together with a prior.

It needs no download and knows only the words it was trained on, which is what the demo needs. Numbers stand for shares
and are read in steps of five. It does not know grids.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional

from engine.model.cdm import FeedForward

_WORD = re.compile(r"\d+(?:[.,]\d+)?|[^\W\d_]+|[,;%]")
_STEP = 5
"""Numbers are rounded to multiples of it: a vocabulary is finite."""


def split_words(text: str) -> list[str]:
    """Return the words of a text, in lower case; numbers up to 100 rounded to multiples of five, larger ones whole."""
    found = []
    for word in _WORD.findall(text.casefold()):
        if word[0].isdigit():
            value = float(word.replace(",", "."))
            word = str(round(value / _STEP) * _STEP if value <= 100 else round(value))
        found.append("," if word == ";" else word)
    return found


def vocabulary(texts: Iterable[str], least: int = 2) -> tuple[str, ...]:
    """Return the words that occur in at least `least` of the texts, in alphabetical order."""
    counts = Counter(word for text in texts for word in set(split_words(text)))
    return tuple(sorted(word for word, n in counts.items() if n >= least))


@dataclass(frozen=True)
class WordTowerConfig:
    """Sizes of a word tower."""

    words: tuple[str, ...]
    """The vocabulary; number 0 of the embedding is padding, word i is number i + 1."""
    width: int = 96
    layers: int = 1
    heads: int = 4
    context: int = 48
    """Words that are read of a text at most."""

    def __post_init__(self) -> None:
        if not self.words or self.width % self.heads or min(self.layers, self.context) < 1:
            raise ValueError(
                "a word tower needs words, a width that is a multiple of its heads, and at least one layer and word of "
                f"context; got {len(self.words)} words, width {self.width}, heads {self.heads}."
            )


class CrossAttention(nn.Module):
    """Let every token of `(B, N, width)` look at the text's tokens `(B, T, width)` that count."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, text: Tensor, counts: Tensor) -> Tensor:
        q = rearrange(self.q(tokens), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(text), "b t (two h d) -> two b h t d", two=2, h=self.heads)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=counts[:, None, None])
        return self.proj(rearrange(seen, "b h n d -> b n (h d)"))


class WordTower(nn.Module):
    """Word numbers → tokens of width E that know their neighbours."""

    def __init__(self, config: WordTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(len(config.words) + 1, config.width, padding_idx=0)
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(config.width, config.heads), FeedForward(config.width)])
            for _ in range(config.layers)
        )
        self._numbers = {word: i + 1 for i, word in enumerate(config.words)}

    def numbers(self, texts: Sequence[str]) -> Integer[Tensor, "b t"]:
        """Return word numbers (B, T), 0 where a text has ended; words beyond the vocabulary are left out."""
        rows = [[self._numbers[w] for w in split_words(text) if w in self._numbers] for text in texts]
        longest = max(1, min(max(len(row) for row in rows), self.config.context))
        found = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, numbers in zip(found, rows, strict=True):
            kept = numbers[:longest]
            row[: len(kept)] = torch.tensor(kept, dtype=torch.long)
        return found

    def unknown(self, text: str) -> list[str]:
        """Return the words of a text that are not in the vocabulary, each once."""
        return list(dict.fromkeys(w for w in split_words(text) if w not in self._numbers))

    def length(self, text: str) -> int:
        """Return how many words of a text are in the vocabulary."""
        return sum(w in self._numbers for w in split_words(text))

    def forward(self, numbers: Integer[Tensor, "b t"]) -> tuple[Float[Tensor, "b t e"], Bool[Tensor, "b t"]]:
        """Return tokens (B, T, E) and which of them are words."""
        counts = numbers > 0
        places = get_1d_sincos_pos_embed_from_grid(self.config.width, torch.arange(numbers.shape[1])).float()
        tokens = self.embedding(numbers) + places.to(self.embedding.weight)
        for attend, think in self.layers:  # type: ignore[misc]
            tokens = tokens + attend(_normed(tokens), _normed(tokens), counts | (numbers.sum(1) == 0)[:, None])
            tokens = tokens + think(_normed(tokens))
        return tokens * counts[..., None], counts


def _normed(tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens, tokens.shape[-1:])
