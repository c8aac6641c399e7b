"""Text towers by name: the prior's own words, and CLIP's text models of transformers.

A tower turns texts into tokens (B, T, E) and says which of them count. It does not know grids. Only a tokenizer and a
text model are loaded, never a processor of pictures. What is not there is an error: tokens of another tower mean
nothing to a prior.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.model.text.prior import WHOLE, TextPrior
from engine.model.weights.clip import CLIPS
from engine.model.weights.hub import locate_files

WORDS = "words"
TOKENIZER = ("vocab.json", "merges.txt")


class TextTower(Protocol):
    """What every text tower promises."""

    @property
    def id(self) -> str:
        """Its name."""
        ...

    @property
    def digest(self) -> str | None:
        """SHA-256 of the weights; None for the prior's own, whose weights are the prior's."""
        ...

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words it knows; empty where it reads everything."""
        ...

    @property
    def dim(self) -> int:
        """E, the channels of a token."""
        ...

    def encode(self, texts: Sequence[str]) -> tuple[Float32[Tensor, "b t e"], Bool[Tensor, "b t"]]:
        """Return tokens and which of them count."""
        ...

    def length(self, text: str) -> tuple[int, int]:
        """Return how many tokens a text has, and how many are read at most."""
        ...

    def unknown(self, text: str) -> list[str]:
        """Return words that the tower cannot read."""
        ...


class OwnWords:
    """The tower that a prior carries."""

    id = WORDS
    digest = None

    def __init__(self, prior: TextPrior) -> None:
        assert prior.words is not None
        self.tower = prior.words
        self.vocabulary = tuple(word for word in prior.words.config.words if word.isalpha())

    @property
    def dim(self) -> int:
        return self.tower.config.width

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Float32[Tensor, "b t e"], Bool[Tensor, "b t"]]:
        numbers = self.tower.numbers(texts).to(self.tower.embedding.weight.device)
        return self.tower(numbers)

    def length(self, text: str) -> tuple[int, int]:
        return self.tower.length(text), self.tower.config.context

    def unknown(self, text: str) -> list[str]:
        return self.tower.unknown(text)


TOWERS = (WORDS, *CLIPS)


def load_tower(
    id: str, prior: TextPrior | None = None, source: str | Path | None = None, device: torch.device | str = "cpu"
) -> TextTower:
    """Return a text tower in float32, as `prior` reads it. `source` is a folder with its weights and its tokenizer;
    None asks the Hub.

    Raises: ValueError for an unknown name; CheckpointError when files are missing, damaged or another network's.
    """
    if id not in TOWERS:
        raise ValueError(f"the text tower must be one of {', '.join(TOWERS)}; got {id!r}.")
    if id == WORDS:
        if prior is None or prior.words is None:
            raise CheckpointError("the text tower 'words' is part of a prior that was trained with it; there is none.")
        return OwnWords(prior)
    from engine.model.text.clip_text import (  # transformers, seconds of import
        ClipText,
        WholeText,
        open_tokenizer,
        read_clip_text,
    )

    spec, flag = CLIPS[id], "--model.text_tower_source"
    if source is None:
        weights = locate_files(spec.repo_id, spec.files, f"The text tower {spec.title}", flag)
        words = locate_files(spec.tokenizer, TOKENIZER, f"The tokenizer of {spec.title}", flag)
    else:
        weights = words = Path(source)
        lacking = [name for name in (*spec.files, *TOKENIZER) if not (weights / name).is_file()]
        if lacking:
            raise CheckpointError(
                f"{flag} must be a folder with {' and '.join((*spec.files, *TOKENIZER))} of {spec.title}; {source} "
                f"lacks {', '.join(lacking)}. They are in https://huggingface.co/{spec.repo_id} and "
                f"https://huggingface.co/{spec.tokenizer}."
            )
    model = read_clip_text(weights / spec.files[0])
    tower = ClipText(id, model.to(torch.device(device)), open_tokenizer(words))  # pyright: ignore[reportArgumentType]
    return WholeText(tower, prior.text_mean) if prior is not None and prior.config.reads == WHOLE else tower


def less_their_mean(tower: TextTower, texts: Sequence[str]) -> tuple[TextTower, Tensor]:
    """Return a CLIP's tower that reads whole texts less the mean of these, and that mean (P,).

    Raises: CheckpointError for another tower.
    """
    from engine.model.text.clip_text import ClipText, WholeText  # transformers, seconds of import

    if not isinstance(tower, ClipText):
        raise CheckpointError(f"whole texts are a CLIP's; the tower is {tower.id!r}. Take one of {', '.join(CLIPS)}.")
    mean = tower.whole(texts).mean(dim=0).cpu()
    return WholeText(tower, mean), mean
