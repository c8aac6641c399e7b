"""The published SSL encoders, vision transformers on transformers' classes: UNI, DINOv2 with registers, Phikon.

Invariant: every tensor of the file is used and every parameter of the network comes from the file, or it is refused.
It does not know where files come from (hub.py). timm and torchvision are not needed: timm's ViT with layer scale is
DINOv2's, apart from names and the fused qkv matrix.
Source: UNI, Chen et al. 2024 (MahmoodLab/UNI); DINOv2 with registers, Darcet et al. 2024; Phikon, Filiot et al. 2023
(owkin/phikon, an iBOT ViT-B/16). Input: 224 px, ImageNet mean and deviation; output: the class token after the
final norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from engine.model.encoders.base import NetworkEncoder, digest_of
from engine.model.weights.folder import check_fit, read_safetensors
from engine.model.weights.ldm_import import load_tensors

INPUT_PX = 224
Colour = tuple[float, float, float]
IMAGENET: tuple[Colour, Colour] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation."""
_TIMM_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
)
_RENAMED = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    ("encoder.layer.", "layers."),
)
"""Names in files on the Hub → names inside later 5.x releases of transformers; applied in this order."""


@dataclass(frozen=True)
class PublishedViT:
    """A published network: its file, the layout of its names and its sizes.

    `grid_px` is the picture size the stored positions are for (518 for DINOv2, whose forward pass resamples them).
    """

    id: str
    title: str
    repo_id: str
    filename: str
    layout: Literal["timm", "transformers"]
    width: int
    depth: int
    heads: int
    patch_px: int
    grid_px: int
    registers: int = 0
    layer_scale: bool = True


UNI = PublishedViT("uni", "UNI", "MahmoodLab/UNI", "pytorch_model.bin", "timm", 1024, 24, 16, 16, 224)
DINOV2_REG_L = PublishedViT(
    "dinov2-reg-l",
    "DINOv2 ViT-L/14 with registers",
    "facebook/dinov2-with-registers-large",
    "model.safetensors",
    "transformers",
    1024,
    24,
    16,
    14,
    518,
    registers=4,
)
PHIKON = PublishedViT(
    "phikon",
    "Phikon",
    "owkin/phikon",
    "model.safetensors",
    "transformers",
    768,
    12,
    12,
    16,
    224,
    layer_scale=False,
)
PUBLISHED = {spec.id: spec for spec in (UNI, DINOV2_REG_L, PHIKON)}


class ViTEncoder(NetworkEncoder):
    """A vision transformer behind the SSLEncoder protocol, frozen, on one device in one dtype."""

    def __init__(self, id: str, network: nn.Module, width: int) -> None:
        """Take a network of transformers (224 px in, tokens of `width` out, the class first) with its weights."""
        super().__init__(network, width)
        self.id = id

    def _vectors(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        return self.network(pixel_values=normalise(images).to(dtype)).last_hidden_state[:, 0]


def normalise(
    images: UInt8[Tensor, "b 3 h w"], px: int = INPUT_PX, mean_std: tuple[Colour, Colour] = IMAGENET
) -> Float32[Tensor, "b 3 {px} {px}"]:
    """Turn uint8 pictures into `px` × `px` float32: bicubic with anti-aliasing, less a mean, over a deviation."""
    light = F.interpolate(images.float() / 255, size=px, mode="bicubic", antialias=True, align_corners=False)
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in mean_std)
    # Clamped, because the networks were trained on 8-bit pictures, whose bicubic overshoot is clipped.
    return (light.clamp(0, 1) - mean) / std


def load_vit(
    spec: PublishedViT, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ViTEncoder:
    """Read a published network from a folder that holds its file.

    Raises: CheckpointError if the file is missing, damaged, hostile, or not this network.
    """
    path = folder / spec.filename
    network = load_weights(build_vit(spec), _read(path), spec.layout, str(path), device, dtype)
    return ViTEncoder(spec.id, network, spec.width)


def digest_vit(spec: PublishedViT, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Return ViTEncoder.digest of the network `load_vit` would load; no network gets the weights. Raises as it does."""
    path = folder / spec.filename
    return digest_of(_fitted(build_vit(spec), _read(path), spec.layout, str(path)), dtype)


def build_vit(spec: PublishedViT) -> nn.Module:
    """Build the network without weights (on the meta device)."""
    sizes = {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "patch_size": spec.patch_px,
        "image_size": spec.grid_px,
        "layer_norm_eps": 1e-6,
    }
    with torch.device("meta"):
        if not spec.layer_scale:
            return ViTModel(ViTConfig(**sizes, intermediate_size=4 * spec.width), add_pooling_layer=False)
        if spec.registers:
            return Dinov2WithRegistersModel(
                Dinov2WithRegistersConfig(**sizes, mlp_ratio=4, num_register_tokens=spec.registers)
            )
        # timm's networks have no token for masked training.
        return Dinov2Model(Dinov2Config(**sizes, mlp_ratio=4, use_mask_token=False))


def load_weights(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    layout: Literal["timm", "transformers"],
    where: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Give `network` (on the meta device) the tensors of a file; `where` names the file in messages.

    Raises: CheckpointError unless names and shapes agree exactly.
    """
    named = _fitted(network, tensors, layout, where)
    # Copied: the file may be mapped, and a mapped file that is replaced later would kill the process.
    owned = {name: value.to(device, dtype, copy=True) for name, value in named.items()}
    network.load_state_dict(owned, assign=True)
    return network


def _read(path: Path) -> dict[str, Tensor]:
    return load_tensors(path) if path.suffix == ".bin" else read_safetensors(path)


def _fitted(
    network: nn.Module, tensors: Mapping[str, Tensor], layout: Literal["timm", "transformers"], where: str
) -> dict[str, Tensor]:
    """Return the tensors of a file by the network's names. Raises CheckpointError unless they agree exactly."""
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    named = _from_timm(tensors) if layout == "timm" else tensors
    named = {_spell(name, wanted): value for name, value in named.items()}
    check_fit({name: value.shape for name, value in named.items()}, wanted, where)
    return named


def _spell(name: str, known: Mapping[str, torch.Size]) -> str:
    """Return the name as the installed transformers spells it."""
    for published, current in _RENAMED:
        if name not in known:
            name = name.replace(published, current)
    return name


def _from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's ViT to transformers' published names, cutting each fused qkv into three.

    A name it does not know stays as it is, for check_fit to report.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith("norm."):
            renamed["layernorm." + name.removeprefix("norm.")] = value
            continue
        target = name
        for timm_name, ours in _TIMM_NAMES:
            target = target.replace(timm_name, ours)
        if ".attn.qkv." in target and value.shape[0] % 3 == 0:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[target.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            renamed[target] = value
    return renamed
