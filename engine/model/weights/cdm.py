"""A CDM on disk: ours (config.json and model.safetensors in a model's folder cdm/) and the published file.

Invariant: a CDM is never used with summaries of another Summarizer where its files say which one it learned from. It
does not know training or sampling. Source: the published file holds the averaged weights under the key "ema".
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.model.cdm import CDM, CDMConfig
from engine.model.config import ModelConfig
from engine.model.summarizer import CELL_TOKENS
from engine.model.weights import ldm_import
from engine.model.weights.folder import check_fit, hash_tensors, read_safetensors, replace_folder
from engine.model.weights.hub import CDM_FILES, NETWORK_FILES, OUR_CONFIG, locate, locate_cdm

CONFIG, WEIGHTS, FIGURES = (*(Path(name).name for name in CDM_FILES), "training.json")
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads of DiT-S, B, L and XL by width: the published file does not say."""


def load_cdm(
    source: str | Path,
    variant: str | None = None,
    own: str | Path | None = None,
    device: torch.device | str = "cpu",
    heads: int | None = None,
) -> CDM:
    """Load the CDM of a model, in float32 and evaluation mode.

    `source` and `variant` name the model, as for ZoomLDM.from_pretrained; `own` is a folder in our layout or a
    published file, None = the folder cdm/ that the model carries. `heads` says what a published file of an unusual
    width does not.
    Raises: CheckpointError when there is none, it is damaged, or it is not this model's.
    """
    found = locate_cdm(source, variant) if own is None else Path(own)
    if found is None:
        raise CheckpointError(
            f"The model {source} must carry a CDM ({' and '.join(CDM_FILES)}) to be sampled without a reference; it "
            "does not. Pass the published file or a folder with --model.cdm_source, train one "
            "(docs/how-to/without_a_reference.md), or give a reference."
        )
    cdm = read_published(found, heads) if found.is_file() else read_cdm(found)
    _check_model(cdm.config, locate(source, variant), found)
    return cdm.to(device)


def save_cdm(
    folder: str | Path, cdm: CDM, dtype: torch.dtype | None = None, figures: Mapping[str, object] | None = None
) -> None:
    """Write our layout, all or nothing; `dtype` casts what is stored, `figures` become training.json.

    Raises: CheckpointError for a folder with other files; ValueError for values that `dtype` cannot hold.
    """
    documents: dict[str, object] = {CONFIG: asdict(cdm.config)}
    replace_folder(
        Path(folder), {WEIGHTS: cdm.state_dict()}, documents | ({FIGURES: figures} if figures else {}), dtype
    )


def read_cdm(folder: Path) -> CDM:
    """Read our layout. Raises CheckpointError for anything missing, surplus, misshapen or damaged."""
    try:
        config = CDMConfig(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:  # a JSON error is a ValueError, an unknown key a TypeError
        raise CheckpointError(f"{folder / CONFIG} must describe a CDM: {error}. Fetch or train it again.") from error
    return _build(config, read_safetensors(folder / WEIGHTS), folder / WEIGHTS)


def read_published(path: Path, heads: int | None = None) -> CDM:
    """Read a published file, {"ema": state dict}; sizes come from the shapes, heads from the width unless given.

    Raises: CheckpointError naming the first tensors that are missing, unknown or misshapen.
    """
    tensors = ldm_import.load_tensors(path, "ema")
    needed = ("pos_embed", "x_embedder.weight", "y_embedder.embedding_table.weight")
    lacking = [name for name in needed if name not in tensors]
    if lacking:
        raise CheckpointError(
            f"{path} must be a CDM; it lacks {', '.join(lacking)} and holds {', '.join(list(tensors)[:5])}."
        )
    layers = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    width = tensors["pos_embed"].shape[-1]
    heads = heads or _HEADS.get(width)
    if heads is None:
        raise CheckpointError(f"{path} does not say how many heads a CDM of width {width} has; pass heads to load_cdm.")
    try:
        config = CDMConfig(
            tokens=tensors["pos_embed"].shape[-2],
            channels=tensors["x_embedder.weight"].shape[-1],
            magnifications=tensors["y_embedder.embedding_table.weight"].shape[0],
            width=width,
            layers=len(layers),
            heads=heads,
        )
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} does not hold a CDM: {error}") from error
    return _build(config, tensors, path)


def write_published(path: Path, cdm: CDM) -> None:
    """Write the published file: the weights in float32 under "ema". Which Summarizer it belongs to is lost.

    Raises: CheckpointError for a CDM on standardised summaries, which that file cannot describe.
    """
    if cdm.config.standardised:
        raise CheckpointError(
            f"{path} would have to hold the mean and spread of this CDM's summaries; the published layout has no place "
            "for them. Train with --model.standardised false."
        )
    torch.save({"ema": {name: value.float().cpu() for name, value in cdm.state_dict().items()}}, path)


def conditioner_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a conditioner's names, shapes and float32 values."""
    total = hashlib.sha256()
    hash_tensors(total, "conditioner", state)
    return total.hexdigest()


def _build(config: CDMConfig, tensors: Mapping[str, Tensor], where: Path) -> CDM:
    with torch.device("meta"):
        cdm = CDM(config)
    check_fit({k: v.shape for k, v in tensors.items()}, {k: v.shape for k, v in cdm.state_dict().items()}, str(where))
    cdm.load_state_dict({name: value.to(torch.float32, copy=True) for name, value in tensors.items()}, assign=True)
    return cdm.eval()


def _check_model(config: CDMConfig, folder: Path, where: Path) -> None:
    """Raise CheckpointError unless a CDM's summaries are those of the model in `folder`."""
    if (folder / OUR_CONFIG).is_file():
        model = ModelConfig.from_json(json.loads((folder / OUR_CONFIG).read_text(encoding="utf-8")))
        state = read_safetensors(folder / NETWORK_FILES["conditioner"])
    else:
        weights = ldm_import.read_ldm(folder)
        model, state = weights.config, weights.networks["conditioner"]
    wanted = (CELL_TOKENS + 1, model.conditioner.output_dim, len(model.magnifications))
    came = (config.tokens, config.channels, config.magnifications)
    if model.conditioner.kind != "summarizer" or came != wanted:
        raise CheckpointError(
            f"The CDM in {where} makes summaries of {came[0]} tokens of {came[1]} at {came[2]} magnifications; the "
            f"model in {folder} needs {wanted[0]} of {wanted[1]} at {wanted[2]} ({model.conditioner.kind}). Take the "
            "CDM that was trained on this model."
        )
    if config.conditioner not in (None, conditioner_digest(state)):
        raise CheckpointError(
            f"The CDM in {where} was trained on summaries of another Summarizer than that of the model in {folder}: "
            "their sizes agree, their weights do not. Train the CDM again on this model "
            "(docs/how-to/without_a_reference.md)."
        )
