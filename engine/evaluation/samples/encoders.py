"""The encoders crops are compared by: those the engine knows (encoders.py of the model), and any CLIP vision tower.

Invariant: an encoder is named with the digest of its weights; weights are safetensors, which hold no code. It does not
know figures.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from engine.core.errors import CheckpointError
from engine.evaluation.samples.inception import load_inception
from engine.model.encoders.base import SSLEncoder
from engine.model.encoders.clip import POSITIONS, TOWER, CLIPEncoder, with_weights
from engine.model.encoders.registry import DEMO, ENCODERS, load_encoder
from engine.model.weights import hub
from engine.model.weights.folder import read_safetensors

CLIP, INCEPTION = "clip", "inception"
NAMES = (*ENCODERS, INCEPTION)
_FILES = ("config.json", "model.safetensors")


def open_encoder(name: str, source: str | None = None, device: str = "cpu") -> SSLEncoder:
    """Load an encoder by name; `source` is its folder or Hub id.

    Raises: ValueError for an unknown name; CheckpointError when its weights cannot be had.
    """
    if name == CLIP:
        return load_clip(source, device)
    if name == INCEPTION:
        if source is None:
            raise CheckpointError("inception's weights must be brought; got none. Pass --inception FILE.")
        return load_inception(Path(source), device)
    if name == DEMO and source is None:
        source = str(hub.locate(DEMO))
    return load_encoder(name, source, device=device, flag="--encoder_source")


def load_clip(source: str | None, device: str = "cpu") -> CLIPEncoder:
    """Read the vision tower of a CLIP in transformers' layout from a folder or the Hub; the text tower is left aside.

    Raises: CheckpointError if the files are missing, damaged, or no CLIP.
    """
    if source is None:
        raise CheckpointError(
            "the encoder clip must be named with its weights; got none. Pass --encoder_source with a folder or a Hub "
            "id such as openai/clip-vit-base-patch32."
        )
    folder = Path(source)
    if not folder.is_dir():
        folder = hub.locate_files(source, list(_FILES), "The CLIP", "--encoder_source")
    try:
        config = CLIPVisionConfig.from_pretrained(folder)
        with torch.device("meta"):
            network = CLIPVisionModelWithProjection(config)
        tensors = {n: v for n, v in read_safetensors(folder / _FILES[1]).items() if n.startswith(TOWER)}
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} must hold a CLIP of transformers ({', '.join(_FILES)}); it cannot be read ({error}). Fetch it "
            "again."
        ) from error
    tensors.pop(POSITIONS, None)
    return with_weights(CLIP, network, tensors, str(folder), device)
