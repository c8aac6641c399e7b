"""The published CLIPs: where their files lie, and open_clip's names for what transformers calls otherwise.

It reads no weights and knows no network. open_clip keeps q, k and v of a block in one matrix.
Sources: OpenAI CLIP ViT-B/32 (Radford et al. 2021, MIT); PLIP (Huang et al. 2023); QuiltNet-B-32 (Ikezogwo et al. 2023,
MIT), whose file is open_clip's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.core.errors import CheckpointError

OPEN_CLIP_CONFIG = "open_clip_config.json"
"""Beside open_clip's weights; says which GELU they were trained with."""


@dataclass(frozen=True)
class PublishedCLIP:
    """A CLIP on the Hub."""

    title: str
    repo_id: str
    files: tuple[str, ...]
    """Its weights, and what else tells how to read them."""
    tokenizer: str
    """Repository of its tokenizer."""


_OPENAI = "openai/clip-vit-base-patch32"
CLIPS = {
    "quiltnet": PublishedCLIP(
        "QuiltNet-B-32", "wisdomik/QuiltNet-B-32", ("open_clip_pytorch_model.bin", OPEN_CLIP_CONFIG), _OPENAI
    ),
    "plip": PublishedCLIP("PLIP", "vinid/plip", ("pytorch_model.bin",), "vinid/plip"),
    "clip": PublishedCLIP("CLIP ViT-B/32", _OPENAI, ("pytorch_model.bin",), _OPENAI),
}


def is_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Say whose names a file of weights has."""
    return "token_embedding.weight" in tensors


def gelu_of(path: Path, open_clip: bool) -> str:
    """Return the activation of a file's network: OpenAI's quick GELU in transformers' files; open_clip's say so beside
    them.

    Raises: CheckpointError when they do not.
    """
    if not open_clip:
        return "quick_gelu"
    said = path.with_name(OPEN_CLIP_CONFIG)
    try:
        quick = bool(json.loads(said.read_text(encoding="utf-8"))["model_cfg"].get("quick_gelu", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{said} must say how {path.name} was made; {error!r}. Fetch it beside it.") from error
    return "quick_gelu" if quick else "gelu"


_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def renamed_blocks(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """Return the blocks `{theirs}.N.` of an open_clip file by transformers' names, `{ours}.N.`."""
    found: dict[str, Tensor] = {}
    depth = theirs.count(".") + 1
    for i in sorted({int(name.split(".")[depth]) for name in tensors if name.startswith(f"{theirs}.")}):
        there, here = f"{theirs}.{i}", f"{ours}.{i}"
        for kind in ("weight", "bias"):
            parts = tensors[f"{there}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                found[f"{here}.self_attn.{name}_proj.{kind}"] = part.contiguous()
            for name, own in _BLOCK:
                found[f"{here}.{own}.{kind}"] = tensors[f"{there}.{name}.{kind}"]
    return found
