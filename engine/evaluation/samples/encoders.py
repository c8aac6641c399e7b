"""The encoders crops are compared by: those the engine knows (encoders.py of the model), and any CLIP vision tower.

Invariant: an encoder is named with the digest of its weights; weights are safetensors, which hold no code. It does not
know figures. Source: CLIP, Radford et al. 2021 (224 px, its own mean and deviation; output: the projected embedding).
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from engine.core.errors import CheckpointError
from engine.evaluation.samples.inception import load_inception
from engine.model.encoders.base import NetworkEncoder, SSLEncoder
from engine.model.encoders.registry import DEMO, ENCODERS, load_encoder
from engine.model.encoders.vit import normalise
from engine.model.weights import hub
from engine.model.weights.folder import check_fit, read_safetensors

CLIP, INCEPTION = "clip", "inception"
NAMES = (*ENCODERS, CLIP, INCEPTION)
_FILES = ("config.json", "model.safetensors")
_SEEN = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_TOWER = ("vision_model.", "visual_projection.")


class CLIPEncoder(NetworkEncoder):
    """The vision tower of a CLIP behind the SSLEncoder protocol; `id` is "clip"."""

    id = CLIP

    def __init__(self, network: CLIPVisionModelWithProjection, input_px: int, width: int) -> None:
        """Take CLIPVisionModelWithProjection with its weights."""
        super().__init__(network, width)
        self._px = input_px

    def _vectors(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        return self.network(pixel_values=normalise(images, self._px, _SEEN).to(dtype)).image_embeds


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
        tensors = {n: v for n, v in read_safetensors(folder / _FILES[1]).items() if n.startswith(_TOWER)}
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} must hold a CLIP of transformers ({', '.join(_FILES)}); it cannot be read ({error}). Fetch it "
            "again."
        ) from error
    tensors.pop("vision_model.embeddings.position_ids", None)  # a constant that old files carry
    check_fit(
        {n: v.shape for n, v in tensors.items()}, {n: v.shape for n, v in network.state_dict().items()}, str(folder)
    )
    network.load_state_dict({n: v.to(device, torch.float32, copy=True) for n, v in tensors.items()}, assign=True)
    embeddings = network.vision_model.embeddings
    # No weight, so not in the file: it was built on the meta device.
    embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions, device=device)[None], False)
    side = round((embeddings.num_positions - 1) ** 0.5) * embeddings.patch_size
    return CLIPEncoder(network, side, network.visual_projection.out_features)
