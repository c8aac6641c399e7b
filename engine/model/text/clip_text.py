"""CLIP's text models as text towers: files of transformers and of open_clip, and the tokenizer, nothing of pictures.

Invariant: what is read fits the network name by name; nothing in a file runs. It does not know priors or grids.
Sources: Radford et al. 2021 (CLIP); open_clip's layout, whose q, k and v are one matrix.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float32
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from engine.core.errors import CheckpointError
from engine.model.encoders.base import digest_of
from engine.model.weights import ldm_import
from engine.model.weights.folder import check_fit

OPEN_CLIP_CONFIG = "open_clip_config.json"
"""Beside open_clip's weights; says which GELU they were trained with."""


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
        read = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.context, return_tensors="pt")
        read = {name: value.to(self.model.device) for name, value in read.items()}
        hidden = self.model.text_model(**read).last_hidden_state
        return hidden.float(), read["attention_mask"].bool()

    def length(self, text: str) -> tuple[int, int]:
        return len(self.tokenizer(text)["input_ids"]), self.context

    def unknown(self, text: str) -> list[str]:
        return []  # CLIP reads bytes


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
    state = from_open_clip(tensors) if "token_embedding.weight" in tensors else {
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
        hidden_act="quick_gelu" if _quick(path, "token_embedding.weight" in tensors) else "gelu",
        eos_token_id=vocab - 1, bos_token_id=vocab - 2,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    check_fit({name: value.shape for name, value in state.items()}, wanted, str(path))
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


def _quick(path: Path, open_clip: bool) -> bool:
    """Say whether a network has OpenAI's quick GELU: transformers' files do, open_clip's say so beside them.

    Raises: CheckpointError when they do not.
    """
    if not open_clip:
        return True
    said = path.with_name(OPEN_CLIP_CONFIG)
    try:
        return bool(json.loads(said.read_text(encoding="utf-8"))["model_cfg"].get("quick_gelu", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{said} must say how {path.name} was made; {error!r}. Fetch it beside it.") from error


_OPEN_CLIP = (
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final.weight", "final_layer_norm.weight"),
    ("ln_final.bias", "final_layer_norm.bias"),
)
_OPEN_CLIP_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return transformers' names for the text model in an open_clip file; its q, k and v are one matrix there."""
    found = {f"text_model.{ours}": tensors[name] for name, ours in _OPEN_CLIP if name in tensors}
    if "text_projection" in tensors:
        found["text_projection.weight"] = tensors["text_projection"].T.contiguous()
    blocks = sorted({int(name.split(".")[2]) for name in tensors if name.startswith("transformer.resblocks.")})
    for i in blocks:
        there, here = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = tensors[f"{there}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                found[f"{here}.self_attn.{name}_proj.{kind}"] = part.contiguous()
            for name, ours in _OPEN_CLIP_BLOCK:
                found[f"{here}.{ours}.{kind}"] = tensors[f"{there}.{name}.{kind}"]
    return found
