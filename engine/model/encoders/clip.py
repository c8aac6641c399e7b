"""The vision towers of CLIPs: one vector per picture, in the space that they share with texts.

Invariant: what is read fits the network name by name; nothing in a file runs. It does not know where files come from.
Source: Radford et al. 2021 (224 px, its own mean and deviation; output: the projected embedding).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from engine.core.errors import CheckpointError
from engine.model.encoders.base import NetworkEncoder
from engine.model.encoders.vit import load_weights, normalise
from engine.model.weights.clip import CLIPS, gelu_of, is_open_clip, renamed_blocks
from engine.model.weights.ldm_import import load_tensors

SEEN = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of the pictures that CLIPs have seen."""
TOWER = ("vision_model.", "visual_projection.")
"""Names of a vision tower in transformers' files."""
POSITIONS = "vision_model.embeddings.position_ids"
"""A constant that old files carry."""


class CLIPEncoder(NetworkEncoder):
    """The vision tower of a CLIP behind the SSLEncoder protocol."""

    def __init__(self, id: str, network: CLIPVisionModelWithProjection, input_px: int, width: int) -> None:
        """Take a network with its weights, the side of a picture as it sees it, and the length of its vectors."""
        super().__init__(network, width)
        self.id, self._px = id, input_px

    def _vectors(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        return self.network(pixel_values=normalise(images, self._px, SEEN).to(dtype)).image_embeds


def load_clip_vision(
    id: str, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CLIPEncoder:
    """Read the vision tower of one of CLIPS from a folder with its files; sizes come from the shapes.

    Raises: CheckpointError if a file is missing, damaged, hostile, or no CLIP.
    """
    path = folder / CLIPS[id].files[0]
    tensors = load_tensors(path)
    open_clip = is_open_clip(tensors)
    state = _from_open_clip(tensors) if open_clip else {n: v for n, v in tensors.items() if n.startswith(TOWER)}
    state.pop(POSITIONS, None)
    patches = state.get("vision_model.embeddings.patch_embedding.weight")
    positions = state.get("vision_model.embeddings.position_embedding.weight")
    if patches is None or positions is None or "visual_projection.weight" not in state:
        raise CheckpointError(f"{path} must hold a CLIP vision tower; it has {', '.join(list(tensors)[:4])}, ….")
    patch, side = patches.shape[-1], round((len(positions) - 1) ** 0.5)
    layers = {name.split(".")[3] for name in state if name.startswith("vision_model.encoder.layers.")}
    config = CLIPVisionConfig(
        hidden_size=patches.shape[0], num_hidden_layers=len(layers), num_attention_heads=max(patches.shape[0] // 64, 1),
        intermediate_size=state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0], patch_size=patch,
        image_size=patch * side, projection_dim=state["visual_projection.weight"].shape[0],
        hidden_act=gelu_of(path, open_clip),
    )  # fmt: skip
    with torch.device("meta"):
        network = CLIPVisionModelWithProjection(config)
    return with_weights(id, network, state, str(path), device, dtype)


def with_weights(
    id: str,
    network: CLIPVisionModelWithProjection,
    tensors: Mapping[str, Tensor],
    where: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CLIPEncoder:
    """Give a network on the meta device the tensors of a file, which `where` names in messages.

    Raises: CheckpointError unless names and shapes agree exactly.
    """
    load_weights(network, tensors, "transformers", where, device, dtype)
    embeddings = network.vision_model.embeddings
    # No weight, so not in the file: it was built on the meta device.
    embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions, device=device)[None], False)
    side = round((embeddings.num_positions - 1) ** 0.5) * embeddings.patch_size
    return CLIPEncoder(id, network, side, network.visual_projection.out_features)


_OPEN_CLIP = (
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1.weight", "embeddings.patch_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_pre.weight", "pre_layrnorm.weight"),  # transformers' own spelling
    ("ln_pre.bias", "pre_layrnorm.bias"),
    ("ln_post.weight", "post_layernorm.weight"),
    ("ln_post.bias", "post_layernorm.bias"),
)


def _from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return transformers' names for the vision transformer in an open_clip file."""
    found = {f"vision_model.{ours}": tensors[f"visual.{n}"] for n, ours in _OPEN_CLIP if f"visual.{n}" in tensors}
    if "visual.proj" in tensors:
        found["visual_projection.weight"] = tensors["visual.proj"].T.contiguous()
    return found | renamed_blocks(tensors, "visual.transformer.resblocks", "vision_model.encoder.layers")
