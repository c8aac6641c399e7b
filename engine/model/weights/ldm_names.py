"""Names and config of the published LDM layout, expressed in diffusers' terms; a bijection for every supported model.

It reads no files. diffusers has converters of these names, but they drop unknown names in silence and fail on a missing
one with KeyError or None; a table in both directions lets every difference be named as the user's file has it. A test
compares the table with diffusers' converters.
Source: CompVis latent-diffusion's module structure as ZoomLDM publishes it; diffusers UNet2DConditionModel, VQModel.
"""

import re
from collections.abc import Iterable
from typing import Any

from engine.core.units import BRCA_SCALE, NAIP_SCALE
from engine.model.config import ConditionerConfig, ModelConfig, unet_arguments, vae_arguments

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."
VAE_PREFIX = "first_stage_model."
CONDITIONER_PREFIX = "cond_stage_model."

_UNET_STEMS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_BLOCK = re.compile(r"(?:(\w+)_blocks\.(\d+)|mid_block)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")


def unet_table(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Map LDM names (below `model.diffusion_model.`) to the diffusers names given."""
    layers = config.unet["layers_per_block"]
    attends = ["CrossAttn" in kind for kind in config.unet["up_block_types"]]
    return {_unet_name(name, layers, attends): name for name in names}


def vae_table(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Map LDM names (below `first_stage_model.`) to the diffusers names given."""
    levels = len(config.vae["block_out_channels"])
    return {_vae_name(name, levels): name for name in names}


def ema_name(raw: str) -> str:
    """Return the EMA name of `model.….weight`: the name below `model.` without its dots."""
    return EMA_PREFIX + raw.removeprefix("model.").replace(".", "")


def _unet_name(name: str, layers: int, attends: list[bool]) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in _UNET_STEMS:
        return f"{_UNET_STEMS[stem]}.{leaf}"
    match = _BLOCK.fullmatch(name)
    assert match, name
    side, block, kind, index, inner = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        part, _, leaf = inner.partition(".")
        inner = f"{_UNET_RESNET[part]}.{leaf}"
    column = int(kind == "attentions")
    if side is None:
        return f"middle_block.{2 * index + column}.{inner}"
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{inner.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + attends[block]}.{inner}"
    if side == "down":
        return f"input_blocks.{first + index + 1}.{column}.{inner}"
    return f"output_blocks.{first + index}.{column}.{inner}"


def _vae_name(name: str, levels: int) -> str:
    half, _, rest = name.partition(".")
    match = _BLOCK.fullmatch(rest)
    if not match:
        return name.replace("conv_norm_out", "norm_out")
    side, block, kind, index, inner = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "attentions":
        part, _, leaf = inner.rpartition(".")
        return f"{half}.mid.attn_1.{_VAE_ATTENTION[part]}.{leaf}"
    inner = inner.replace("conv_shortcut", "nin_shortcut")
    if side is None:
        return f"{half}.mid.block_{index + 1}.{inner}"
    level = block if side == "down" else levels - 1 - block  # LDM numbers both halves from the finest level
    if kind == "resnets":
        return f"{half}.{side}.{level}.block.{index}.{inner}"
    return f"{half}.{side}.{level}.{kind.removesuffix('rs')}.{inner}"


def read_config(document: Any, magnifications: int, scale_factor: float | None) -> ModelConfig:
    """Translate a parsed config.yaml into a ModelConfig.

    `magnifications` is how many the weights know (0 for the predecessor, which knows one). The predecessor's files do
    not say their µm/px; 20x at 0.5 is assumed, which holds for its BRCA 20x and CRC models. `scale_factor` is the one
    stored with the weights, if any; it wins over the config.
    Raises: ValueError naming the dotted key that is missing or has a value this engine cannot express.
    """
    params = Section(document, "").section("model.params")
    params.demand("parameterization", "eps")
    params.demand("conditioning_key", "crossattn")
    params.demand("beta_schedule", "linear")
    conditioner, ssl_dim = _conditioner(params.section("cond_stage_config"))
    if magnifications not in (0, len(BRCA_SCALE.names), len(NAIP_SCALE.names)):
        raise ValueError(f"the weights know {magnifications} magnifications; 8 (BRCA) and 4 (NAIP) are published.")
    scale = NAIP_SCALE if magnifications == len(NAIP_SCALE.names) else BRCA_SCALE
    encoder = "unknown"
    if magnifications and ssl_dim == 1024:
        encoder = "uni" if scale is BRCA_SCALE else "dinov2-reg-l"
    return ModelConfig(
        magnifications=scale.names if magnifications else scale.names[:1],
        base_mpp=scale.base_mpp,
        ssl_dim=ssl_dim,
        encoder=encoder,
        conditioner=conditioner,
        unet=_unet(params.section("unet_config.params")),
        vae=_vae(params.section("first_stage_config.params")),
        scale_factor=params.get("scale_factor", 1.0) if scale_factor is None else scale_factor,
        beta_start=params.get("linear_start"),
        beta_end=params.get("linear_end"),
        timesteps=params.get("timesteps", 1000),
    )


class Section:
    """A part of a YAML document that knows its dotted path, for messages."""

    def __init__(self, values: Any, path: str) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{path or 'the document'} must be a mapping; got {type(values).__name__}.")
        self.values, self.path = values, path

    def section(self, dotted: str) -> "Section":
        here = self
        for name in dotted.split("."):
            here = Section(here.get(name), f"{here.path}.{name}".lstrip("."))
        return here

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; without it the default, or a ValueError when there is no default."""
        value = self.values.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}.{key} is missing.")
        return value

    def demand(self, key: str, value: Any) -> None:
        """Raise ValueError unless the key is absent or has the only value this engine can express."""
        if self.values.get(key, value) != value:
            raise ValueError(f"{self.path}.{key} must be {value!r}; got {self.values[key]!r}.")


def _unet(params: Section) -> dict[str, Any]:
    for key, value in (
        ("use_spatial_transformer", True),
        ("use_scale_shift_norm", False),
        ("resblock_updown", False),
        ("conv_resample", True),
        ("dims", 2),
        ("num_classes", None),
        ("n_embed", None),
    ):
        params.demand(key, value)
    multipliers, base = params.get("channel_mult"), params.get("model_channels")
    if multipliers[0] != 1:
        raise ValueError(f"{params.path}.channel_mult must begin with 1; got {multipliers}.")
    channels = tuple(base * m for m in multipliers)
    width = params.get("num_head_channels", -1)
    heads = params.get("num_heads") if width == -1 else tuple(c // width for c in channels)
    sizes = {"image_size": "sample_size", "in_channels": "in_channels", "out_channels": "out_channels"}
    return unet_arguments(
        channels=channels,
        attention=tuple(2**level in params.get("attention_resolutions") for level in range(len(channels))),
        heads=heads,
        layers=params.get("num_res_blocks"),
        context=params.get("context_dim"),
        depth=params.get("transformer_depth", 1),
    ) | {theirs: params.get(ours) for ours, theirs in sizes.items()}


def _vae(params: Section) -> dict[str, Any]:
    dd = params.section("ddconfig")
    for key, value in (("double_z", False), ("attn_resolutions", []), ("in_channels", 3), ("out_ch", 3)):
        dd.demand(key, value)
    channels = tuple(dd.get("ch") * m for m in dd.get("ch_mult"))
    codes, code_dim = params.get("n_embed"), params.get("embed_dim")
    sizes = {"latent_channels": dd.get("z_channels"), "sample_size": dd.get("resolution")}
    return vae_arguments(channels, dd.get("num_res_blocks"), codes, code_dim) | sizes


def _conditioner(section: Section) -> tuple[ConditionerConfig, int]:
    """Return the conditioner's config and the width of the SSL vectors."""
    kind, params = section.get("target").rpartition(".")[2], section.section("params")
    if kind == "EmbeddingViT2_5":
        output, width = params.get("output_channels"), params.get("hidden_channels")
        layers, heads, mlp = params.get("num_layers"), params.get("num_heads", 8), params.get("vit_mlp_dim")
        return ConditionerConfig("summarizer", output, width, layers, heads, mlp), params.get("input_channels")
    if kind not in ("PatchEmbedder", "SSLEmbedder"):
        raise ValueError(f"{section.path}.target must be EmbeddingViT2_5, PatchEmbedder or SSLEmbedder; got {kind}.")
    two = kind == "SSLEmbedder"
    conditioner = ConditionerConfig(
        "token",
        output_dim=512 if two else params.get("target_dim", 512),  # SSLEmbedder fixes 512 in its code
        region_dim=params.get("region_embed_dim", 768) if two else 0,
        normalize=params.get("normalize_ssl", False),
    )
    return conditioner, params.get("patch_embed_dim", 384 if two else 768)
