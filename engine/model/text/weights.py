"""A text prior on disk: config.json and model.safetensors, in the folder text/ of a model or in one of its own.

Invariant: a prior is never used with a model of another SSL encoder. It does not know sampling or training.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from engine.core.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.text.prior import TextPrior, TextPriorConfig
from engine.model.text.words import WordTowerConfig
from engine.model.weights.folder import check_fit, read_safetensors, replace_folder
from engine.model.weights.hub import TEXT_FILES, locate_text

CONFIG, WEIGHTS, FIGURES = (*(Path(name).name for name in TEXT_FILES), "training.json")


def save_prior(
    folder: Path, prior: TextPrior, dtype: torch.dtype | None = None, figures: Mapping[str, object] | None = None
) -> None:
    """Write a prior, all or nothing; `dtype` casts what is stored, `figures` become training.json.

    Raises: CheckpointError for a folder with other files; ValueError for values that `dtype` cannot hold.
    """
    words = None if prior.words is None else asdict(prior.words.config)
    documents: dict[str, object] = {CONFIG: {"prior": asdict(prior.config), "words": words}}
    replace_folder(folder, {WEIGHTS: prior.state_dict()}, documents | ({FIGURES: figures} if figures else {}), dtype)


def read_prior(folder: Path) -> TextPrior:
    """Read what `save_prior` wrote, in float32 and evaluation mode. Raises: CheckpointError."""
    path = folder / CONFIG
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        words = stored["words"]
        tower = None if words is None else WordTowerConfig(**(words | {"words": tuple(words["words"])}))
        with torch.device("meta"):
            prior = TextPrior(TextPriorConfig(**stored["prior"]), tower)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} must describe a text prior: {error}. Fetch or train it again.") from error
    tensors = read_safetensors(folder / WEIGHTS)
    wanted = {name: value.shape for name, value in prior.state_dict().items()}
    check_fit({name: value.shape for name, value in tensors.items()}, wanted, str(folder / WEIGHTS))
    prior.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return prior.eval()


def load_prior(
    source: str, variant: str | None, own: str | None, model: ModelConfig, device: torch.device | str = "cpu"
) -> TextPrior:
    """Load the text prior of a model; `own` is a folder, None = the folder text/ that the model carries.

    Raises: CheckpointError when there is none, it is damaged, or its grids are not this model's.
    """
    found = locate_text(source, variant) if own is None else Path(own)
    if found is None:
        raise CheckpointError(
            f"The model {source} must carry a text prior ({' and '.join(TEXT_FILES)}) to be sampled from a text; it "
            "does not. Pass a folder with --model.text_source, train one (docs/how-to/text_to_image.md), or give a "
            "reference."
        )
    prior = read_prior(found)
    came, wanted = (prior.config.encoder, prior.config.ssl_dim), (model.encoder, model.ssl_dim)
    if came != wanted:
        raise CheckpointError(
            f"The text prior in {found} makes vectors of {came[0]!r} with {came[1]} channels; the model {source} is "
            f"conditioned on {wanted[0]!r} with {wanted[1]}. Take the prior that was trained for this model."
        )
    return prior.to(device)
