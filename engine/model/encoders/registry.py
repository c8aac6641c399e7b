"""Encoders by name: the demo's own, texture, UNI, DINOv2, Phikon and CLIPs, from the model folder, a local one or the
Hub.

It does not know networks (*_encoder.py) or pictures (reference.py). Nothing is substituted: an encoder that is not
there is an error, because vectors of another network mean nothing to the conditioner.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.model.encoders.base import SSLEncoder
from engine.model.encoders.clip import load_clip_vision
from engine.model.encoders.demo import DemoEncoder
from engine.model.encoders.texture import TextureEncoder
from engine.model.encoders.vit import PUBLISHED, PublishedViT, digest_vit, load_vit
from engine.model.weights.clip import CLIPS, PublishedCLIP
from engine.model.weights.folder import read_safetensors
from engine.model.weights.hub import locate_files

__all__ = ["ENCODERS", "DemoEncoder", "SSLEncoder", "load_encoder"]

DEMO, TEXTURE = "demo", "texture"
ENCODERS = (DEMO, TEXTURE, *PUBLISHED, *CLIPS)
EMBEDDED = "encoder/model"
"""Where a model folder keeps its own encoder (`model.extras[EMBEDDED]`, encoder/model.safetensors)."""
_WAY_ROUND = "or pass vectors that were computed elsewhere (--embeddings)"


@dataclass(frozen=True)
class EncoderDescription:
    """What is known of an encoder before its network is built."""

    id: str
    dim: int
    """D, the length of one vector."""
    digest: str
    """SSLEncoder.digest of the encoder in the dtype it would compute in."""


def describe_encoder(
    id: str,
    source: str | Path | None = None,
    extras: Mapping[str, Mapping[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
    flag: str = "--model.encoder_source",
) -> EncoderDescription:
    """Return what `load_encoder` of the same arguments would say of itself; no network gets the weights.

    Raises: as `load_encoder`.
    """
    if id in PUBLISHED:
        spec = PUBLISHED[id]
        return EncoderDescription(id, spec.width, digest_vit(spec, _folder_of(spec, source, flag), dtype))
    # The demo's and texture are constants and a whitening; of a CLIP the digest needs the file read whole anyway.
    small = load_encoder(id, source, extras, "cpu", dtype, flag)
    return EncoderDescription(small.id, small.dim, small.digest)


def load_encoder(
    id: str,
    source: str | Path | None = None,
    extras: Mapping[str, Mapping[str, Tensor]] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    flag: str = "--model.encoder_source",
) -> SSLEncoder:
    """Load the SSL encoder that a model was trained with.

    `id` is one of ENCODERS (ModelConfig.encoder). `source` is a folder with the encoder's file, or a Hub id; None
    means the model's own `extras` for the demo, nothing for texture, else the repository the encoder was published
    in. The demo encoder and texture compute in float32 whatever `dtype`. `flag` is what messages tell to pass.
    Raises: ValueError for an unknown id; CheckpointError when weights are missing, gated, damaged or hostile.
    """
    if id not in ENCODERS:
        near = difflib.get_close_matches(id.lower(), ENCODERS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Choose one of them, {_WAY_ROUND}."
        raise ValueError(f"the SSL encoder must be one of {', '.join(ENCODERS)}; got {id!r}. {hint}")
    if id == DEMO:
        return _load_demo(source, extras or {}, device, flag)
    if id == TEXTURE:
        return TextureEncoder().to(device)
    if id in CLIPS:
        return load_clip_vision(id, _folder_of(CLIPS[id], source, flag), device, dtype)
    spec = PUBLISHED[id]
    return load_vit(spec, _folder_of(spec, source, flag), device, dtype)


def _folder_of(spec: PublishedViT | PublishedCLIP, source: str | Path | None, flag: str) -> Path:
    """Return the folder that holds a published encoder's files, fetched if they are the Hub's."""
    files = (spec.filename,) if isinstance(spec, PublishedViT) else spec.files
    if source is None or not Path(source).is_dir():
        repo_id = spec.repo_id if source is None else _hub_id(source, flag)
        return locate_files(repo_id, files, f"The SSL encoder {spec.title}", flag)
    folder = Path(source)
    if lacking := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{flag} must be a folder with {spec.title}'s {' and '.join(lacking)}; {folder} has none. "
            f"Download it from https://huggingface.co/{spec.repo_id}, {_WAY_ROUND}."
        )
    return folder


def _load_demo(
    source: str | Path | None, extras: Mapping[str, Mapping[str, Tensor]], device: torch.device | str, flag: str
) -> DemoEncoder:
    if source is not None:
        path = Path(source) / f"{EMBEDDED}.safetensors"
        if not path.is_file():
            raise CheckpointError(
                f"{flag} must be a model folder with a demo encoder ({EMBEDDED}.safetensors); {source} has none. "
                "Leave the flag out to take the model's own."
            )
        return DemoEncoder.from_tensors(read_safetensors(path)).to(device)
    if EMBEDDED not in extras:
        raise CheckpointError(
            f"a model with encoder 'demo' must carry it as {EMBEDDED}.safetensors; this one does not. "
            f"Name a model folder that does with {flag}, {_WAY_ROUND}."
        )
    return DemoEncoder.from_tensors(extras[EMBEDDED]).to(device)


def _hub_id(source: str | Path, flag: str) -> str:
    owner, slash, name = str(source).partition("/")
    if not (owner and slash and name) or "/" in name or owner in (".", "..", "~"):
        raise CheckpointError(
            f"{flag} must be an existing folder or a Hub id (owner/name); got {str(source)!r}, which is neither."
        )
    return str(source)
