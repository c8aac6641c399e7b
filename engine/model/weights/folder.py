"""Our layout on disk: written whole or not at all, read back bit by bit, safetensors only.

It does not know the published layout nor what the weights mean.
Layout: config.json (ModelConfig), unet/ and vae/ (folders diffusers reads), conditioner/model.safetensors, and any
other <folder>/<name>.safetensors, which travel along as extras. A CDM beside them is cdm_store.py's.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.networks import build_networks
from engine.model.weights.hub import CDM_FILES, NETWORK_FILES, OUR_CONFIG, TEXT_FILES
from engine.model.weights.training_slides import FILE as TRAINING_SLIDES

CODEBOOK = "quantize.embedding.weight"
"""The autoencoder's tensor that is never stored or kept below float32."""


@dataclass
class Weights:
    """A model as data: config, state dicts by network ("unet", "vae", "conditioner") and extras by "folder/name"."""

    config: ModelConfig
    networks: dict[str, dict[str, Tensor]]
    extras: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def expected_shapes(config: ModelConfig) -> dict[str, dict[str, torch.Size]]:
    """Return the shape of every tensor the config implies, by network and name; costs no memory."""
    named = build_networks(config, "meta").named()
    return {part: {k: v.shape for k, v in network.state_dict().items()} for part, network in named.items()}


def check_fit(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], where: str) -> None:
    """Raise CheckpointError unless names and shapes agree exactly; name the first five that do not."""
    for word, names in (
        ("lacks", [name for name in wanted if name not in found]),
        ("has, beyond what the model knows,", [name for name in found if name not in wanted]),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(
                f"{where} {word} {', '.join(names[:5])}{more}. Config and weights do not belong together."
            )
    wrong = [name for name in wanted if found[name] != wanted[name]]
    if wrong:
        shapes = "; ".join(f"{n} must be {tuple(wanted[n])}, is {tuple(found[n])}" for n in wrong[:5])
        raise CheckpointError(f"{where} has tensors of the wrong shape: {shapes}.")


def write_folder(folder: Path, weights: Weights, dtype: torch.dtype | None = None) -> None:
    """Write a model in our layout, casting to `dtype` if given (the codebook stays float32).

    Everything is written beside the target and renamed into place. An earlier model there is replaced; a folder that
    holds anything else is refused.
    Raises: CheckpointError for such a folder; ValueError for values that `dtype` cannot hold or a bad extra's name.
    """
    files = {NETWORK_FILES[part]: state for part, state in weights.networks.items()}
    for name, tensors in weights.extras.items():
        if not re.fullmatch(r"(?!(unet|vae|conditioner|cdm|text)/)[\w-]+/[\w-]+", name):
            raise ValueError(f"an extra must be named folder/name, in a folder of its own kind; got {name!r}.")
        files[f"{name}.safetensors"] = tensors
    documents = {OUR_CONFIG: weights.config.to_json()}
    documents |= {"unet/config.json": {"_class_name": "UNet2DConditionModel"} | weights.config.unet}
    documents |= {"vae/config.json": {"_class_name": "VQModel"} | weights.config.vae}
    replace_folder(folder, files, documents, dtype)


def replace_folder(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, object],
    dtype: torch.dtype | None = None,
) -> None:
    """Write safetensors and JSON files, by name, beside `folder` and rename them into place.

    An earlier folder with these files alone is replaced; one that holds anything else is refused.
    Raises: as `write_folder`.
    """
    folder = Path(os.path.abspath(folder))
    _refuse_foreign(folder, {*files, *documents, TRAINING_SLIDES})
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        for name, state in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            stored = {key: _cast(value, key, dtype) for key, value in state.items()}
            save_file(stored, fresh / name, metadata={"format": "pt"})
        for name, document in documents.items():
            (fresh / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _swap(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_folder(folder: Path) -> Weights:
    """Read a model in our layout. Raises CheckpointError for anything missing, surplus, misshapen or damaged."""
    config = read_config(folder)
    networks = {}
    for part, wanted in expected_shapes(config).items():
        path = folder / NETWORK_FILES[part]
        state = read_safetensors(path)
        check_fit({k: v.shape for k, v in state.items()}, wanted, str(path))
        networks[part] = state
    own = {Path(name).parts[0] for name in (*NETWORK_FILES.values(), *CDM_FILES, *TEXT_FILES)}
    paths = sorted(p for p in folder.glob("*/*.safetensors") if p.parent.name not in own)
    extras = {f"{p.parent.name}/{p.stem}": read_safetensors(p) for p in paths}
    return Weights(config, networks, extras)


def read_config(folder: Path) -> ModelConfig:
    """Read what the model of a folder is, and none of its weights. Raises CheckpointError."""
    try:
        return ModelConfig.from_json(json.loads((folder / OUR_CONFIG).read_text(encoding="utf-8")))
    except ValueError as error:  # a JSON error is one too
        raise CheckpointError(f"{folder / OUR_CONFIG} is not a model config: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read one safetensors file into memory on the CPU. Raises CheckpointError if it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing, truncated or not safetensors ({error}); fetch it again.") from error


def digest(weights: Weights, dtype: torch.dtype | None = None) -> str:
    """Return a SHA-256 over config, names, shapes and values; the same for a folder and the model loaded from it.

    Values are hashed as float32, so the dtype a model was stored in does not matter, only the numbers. `dtype` rounds
    the networks' as loading the model in it would.
    """
    total = hashlib.sha256(json.dumps(weights.config.to_json(), sort_keys=True).encode())
    for part, state in sorted((weights.networks | weights.extras).items()):
        hash_tensors(total, part, state, dtype if part in weights.networks else None)
    return total.hexdigest()


def hash_tensors(
    total: "hashlib._Hash", part: str, state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Add names, shapes and float32 values of a state dict to a hash, in the order of the names.

    `dtype` rounds the values first, but for the codebook's.
    """
    for name, tensor in sorted(state.items()):
        if dtype is not None and name != CODEBOOK:
            tensor = tensor.to(dtype)
        wide = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None).contiguous()
        total.update(f"\n{part}/{name} {tuple(wide.shape)}\n".encode())
        total.update(wide.view(-1).numpy().data)


def _cast(tensor: Tensor, name: str, dtype: torch.dtype | None) -> Tensor:
    target = dtype if dtype is not None and tensor.is_floating_point() and name != CODEBOOK else tensor.dtype
    cast = tensor.detach().to("cpu", target).contiguous()
    if cast.is_floating_point() and cast.isfinite().sum() < tensor.isfinite().sum():
        raise ValueError(f"{name} has values beyond {target}; store the model in a wider dtype.")
    return cast


def _refuse_foreign(folder: Path, own: set[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} must be a folder to write a model to; it is a file.")
    present = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())
    foreign = [name for name in present if name not in own]
    if foreign:
        raise CheckpointError(
            f"{folder} holds files that would be lost: {', '.join(foreign[:5])}; choose another folder."
        )


def _swap(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
        return
    old = fresh.with_suffix(".old")
    folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old)
