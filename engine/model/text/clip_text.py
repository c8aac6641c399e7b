"""CLIP's text models as text towers: files of transformers and of open_clip, and the tokenizer, nothing of pictures.

Invariant: what is read fits the network name by name; nothing in a file runs. It does not know priors or grids.
Source: Radford et al. 2021 (CLIP).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float32
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from engine.core.errors import CheckpointError
from engine.model.encoders.base import digest_of
from engine.model.weights import ldm_import
from engine.model.weights.clip import gelu_of, is_open_clip, renamed_blocks
from engine.model.weights.folder import check_fit


class ClipText:
    """CLIP's text model: the last hidden states of all tokens up to the end of the text."""

    vocabulary: tuple[str, ...] = ()

    def __init__(self, id: str, model: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> None:
        self.id, self.tokenizer = id, tokenizer
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.digest = digest_of(self.model.state_dict())
        self.context = int(model.config.max_position_embeddings)

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Float32[Tensor, "b t e"], Bool[Tensor, "b t"]]:
        read = self._read(texts)
        hidden = self.model.text_model(**read).last_hidden_state
        return hidden.float(), read["attention_mask"].bool()

    @torch.no_grad()
    def whole(self, texts: Sequence[str]) -> Float32[Tensor, "b p"]:
        """Return each text as one vector of length 1, in the space that CLIP shares with pictures."""
        return functional.normalize(self.model(**self._read(texts)).text_embeds.float(), dim=-1)

    def _read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        read = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.context, return_tensors="pt")
        return {name: value.to(self.model.device) for name, value in read.items()}

    def length(self, text: str) -> tuple[int, int]:
        return len(self.tokenizer(text)["input_ids"]), self.context

    def unknown(self, text: str) -> list[str]:
        return []  # CLIP reads bytes


class WholeText:
    """A CLIP's texts as single vectors less the mean text, for a prior that has learned from pictures in their place.

    Texts and pictures lie apart in CLIP's space, so each side is taken from its own mean.
    Source: Liang et al. 2022 (the gap between the two).
    """

    vocabulary: tuple[str, ...] = ()

    def __init__(self, tower: ClipText, mean: Float32[Tensor, " p"]) -> None:
        self.tower, self.mean = tower, mean
        self.id, self.digest, self.dim = tower.id, tower.digest, len(mean)

    def encode(self, texts: Sequence[str]) -> tuple[Float32[Tensor, "b 1 p"], Bool[Tensor, "b 1"]]:
        vectors = self.tower.whole(texts)
        tokens = (vectors - self.mean.to(vectors))[:, None]
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def length(self, text: str) -> tuple[int, int]:
        return self.tower.length(text)

    def unknown(self, text: str) -> list[str]:
        return self.tower.unknown(text)


def open_tokenizer(folder: Path) -> CLIPTokenizer:
    """Open the tokenizer whose vocab.json and merges.txt lie in a folder. Raises: CheckpointError."""
    try:
        return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} must hold CLIP's vocab.json and merges.txt; {error}.") from error


def read_clip_text(path: Path) -> CLIPTextModelWithProjection:
    """Read a CLIP's text model from a file of transformers or open_clip; sizes come from the shapes.

    Nothing in the file runs. Raises: CheckpointError.
    """
    tensors = ldm_import.load_tensors(path)
    open_clip = is_open_clip(tensors)
    state = from_open_clip(tensors) if open_clip else {
        name: value for name, value in tensors.items()
        if name.startswith(("text_model.", "text_projection.")) and not name.endswith("position_ids")
    }  # fmt: skip
    where = "text_model.embeddings.token_embedding.weight"
    if where not in state or "text_projection.weight" not in state:
        raise CheckpointError(f"{path} must hold a CLIP text model; it has {', '.join(list(tensors)[:4])}, ….")
    layers = {name.split(".")[3] for name in state if name.startswith("text_model.encoder.layers.")}
    vocab, width = state[where].shape
    config = CLIPTextConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=len(layers), num_attention_heads=max(width // 64, 1),
        intermediate_size=state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        max_position_embeddings=state["text_model.embeddings.position_embedding.weight"].shape[0],
        projection_dim=state["text_projection.weight"].shape[0],
        hidden_act=gelu_of(path, open_clip),
        eos_token_id=vocab - 1, bos_token_id=vocab - 2,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    check_fit({name: value.shape for name, value in state.items()}, wanted, str(path))
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


_OPEN_CLIP = (
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final.weight", "final_layer_norm.weight"),
    ("ln_final.bias", "final_layer_norm.bias"),
)


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return transformers' names for the text model in an open_clip file; others are left aside."""
    found = {f"text_model.{ours}": tensors[name] for name, ours in _OPEN_CLIP if name in tensors}
    if "text_projection" in tensors:
        found["text_projection.weight"] = tensors["text_projection"].T.contiguous()
    return found | renamed_blocks(tensors, "transformer.resblocks", "text_model.encoder.layers")
