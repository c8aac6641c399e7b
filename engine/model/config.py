"""What a model is, apart from its weights: validated, and the same in JSON and in memory.

It does not know files, layouts or torch. `unet` and `vae` hold the arguments of the two diffusers classes.
Source: ZoomLDM (CVPR 2025); Large-Image-Diffusion (CVPR 2024) for kind "token".
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from engine.core.units import BRCA_SCALE, MagnificationScale

CONDITIONER_KINDS = ("summarizer", "token")
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class ConditionerConfig:
    """Sizes of the network that turns SSL vectors into cross-attention tokens.

    `output_dim` is the width of a token. `width` to `mlp` apply to "summarizer", the rest to "token": `region_dim` is
    the width of the second vector of the two-token form (0 = one token), `normalize` scales vectors to length 1 first.
    """

    kind: str = "summarizer"
    output_dim: int = 512
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp: int = 2048
    region_dim: int = 0
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.kind not in CONDITIONER_KINDS:
            raise ValueError(f"conditioner.kind must be one of {CONDITIONER_KINDS}; got {self.kind!r}.")
        for name in ("output_dim", "width", "layers", "heads", "mlp"):
            if getattr(self, name) < 1:
                raise ValueError(f"conditioner.{name} must be at least 1; got {getattr(self, name)}.")
        if self.width % self.heads:
            raise ValueError(f"conditioner.width={self.width} must be a multiple of conditioner.heads={self.heads}.")
        if self.region_dim < 0:
            raise ValueError(f"conditioner.region_dim must be 0 (one token) or more; got {self.region_dim}.")


@dataclass(frozen=True)
class ModelConfig:
    """One model: its magnifications, its SSL encoder and the sizes of its three networks.

    `base_mpp` is in µm/px. `encoder` names the SSL encoder ("uni", "dinov2-reg-l", "demo", "unknown"); `ssl_dim` is
    the width of one SSL vector. `scale_factor` multiplies latents after encoding (1.0 in the published models).
    `prediction_type` is what the U-Net returns, in diffusers' words: "epsilon" in the published models; "v_prediction"
    (Salimans & Ho 2022) keeps x0's error bounded at late times, which a model trained for minutes needs.
    """

    magnifications: tuple[str, ...]
    base_mpp: float
    ssl_dim: int
    encoder: str
    conditioner: ConditionerConfig
    unet: dict[str, Any]
    vae: dict[str, Any]
    scale_factor: float = 1.0
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    timesteps: int = 1000
    prediction_type: str = "epsilon"
    scale: MagnificationScale = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "magnifications", tuple(self.magnifications))
        object.__setattr__(self, "scale", MagnificationScale(self.magnifications, self.base_mpp))
        # JSON knows no tuples: normalising here makes the value read back equal to the one written.
        object.__setattr__(self, "unet", json.loads(json.dumps(self.unet)))
        object.__setattr__(self, "vae", json.loads(json.dumps(self.vae)))
        if self.ssl_dim < 1:
            raise ValueError(f"ssl_dim must be at least 1; got {self.ssl_dim}.")
        if not self.encoder:
            raise ValueError("encoder must name an SSL encoder; use 'unknown' when there is none.")
        if not 0 < self.beta_start < self.beta_end < 1:
            raise ValueError(f"0 < beta_start < beta_end < 1 must hold; got {self.beta_start} and {self.beta_end}.")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}; got {self.prediction_type!r}.")
        if self.timesteps < 2:
            raise ValueError(f"timesteps must be at least 2; got {self.timesteps}.")
        if not self.scale_factor > 0:
            raise ValueError(f"scale_factor must be positive; got {self.scale_factor}.")
        context, output = self.unet.get("cross_attention_dim"), self.conditioner.output_dim
        if context != output:
            raise ValueError(f"unet.cross_attention_dim={context} must equal conditioner.output_dim={output}.")

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values; `from_json` reads it back to an equal config."""
        values = asdict(self)
        del values["scale"]
        return values | {"magnifications": list(self.magnifications)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read what `to_json` wrote. Raises ValueError for an unknown, missing or wrong value."""
        if not isinstance(values, dict):
            raise ValueError(f"model config must be a mapping; got {type(values).__name__}.")
        known = {f.name for f in fields(cls) if f.init}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"model config has unknown keys {unknown}; known: {sorted(known)}.")
        try:
            rest = {name: value for name, value in values.items() if name != "conditioner"}
            return cls(conditioner=ConditionerConfig(**values["conditioner"]), **rest)
        except (TypeError, KeyError) as error:
            raise ValueError(f"model config is incomplete or mistyped: {error}.") from error


def published_config() -> ModelConfig:
    """Return the published BRCA model: 400.9 M parameters in the U-Net, 55.3 M in the autoencoder."""
    return ModelConfig(
        magnifications=BRCA_SCALE.names,
        base_mpp=BRCA_SCALE.base_mpp,
        ssl_dim=1024,
        encoder="uni",
        conditioner=ConditionerConfig(),
        unet=unet_arguments((192, 384, 576, 960), (False, True, True, True), heads=1, layers=2, context=512),
        vae=vae_arguments((128, 256, 512), layers=2, codes=8192),
    )


def tiny_config(**changes: Any) -> ModelConfig:
    """Return a model small enough for tests (0.7 M parameters): two U-Net levels, 65×32 tokens, 16-wide SSL."""
    values: dict[str, Any] = {
        "magnifications": ("20x", "10x", "5x", "2.5x"),
        "base_mpp": 0.5,
        "ssl_dim": 16,
        "encoder": "unknown",
        "conditioner": ConditionerConfig(output_dim=32, width=32, layers=1, heads=4, mlp=64),
        "unet": unet_arguments(channels=(32, 32), attention=(False, True), heads=1, layers=1, context=32),
        "vae": vae_arguments(channels=(32, 32, 32), layers=1, codes=64),
    }
    return ModelConfig(**(values | changes))


def unet_arguments(
    channels: tuple[int, ...],
    attention: tuple[bool, ...],
    heads: int | tuple[int, ...],
    layers: int,
    context: int,
    depth: int = 1,
) -> dict[str, Any]:
    """Return UNet2DConditionModel's arguments for an LDM U-Net; finest level first.

    `heads` is a number of heads: diffusers calls it `attention_head_dim` for historical reasons.
    """
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    return {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(channels),
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": layers,
        "attention_head_dim": heads if isinstance(heads, int) else list(heads),
        "cross_attention_dim": context,
        "transformer_layers_per_block": depth,
    }


def vae_arguments(channels: tuple[int, ...], layers: int, codes: int, code_dim: int = 3) -> dict[str, Any]:
    """Return VQModel's arguments for an LDM VQ autoencoder; finest level first. Three levels make it f4."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": layers,
        "latent_channels": 3,
        "num_vq_embeddings": codes,
        "vq_embed_dim": code_dim,
        "sample_size": 256,
        # ModelConfig.scale_factor is read instead; diffusers' default belongs to Stable Diffusion.
        "scaling_factor": 1.0,
    }
