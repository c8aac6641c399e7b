"""Our model → the published LDM layout: weights.ckpt and config.yaml that the published code loads.

Invariant: names, shapes and dtypes are those of the published checkpoints, and reading the folder back gives the same
config and the same tensors; what the layout cannot express is refused by name. It does not know training.
Source: CompVis latent-diffusion (DDPM.register_schedule, LitEma) as ZoomLDM publishes it.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.core.files import replacing_folder
from engine.model.config import ModelConfig
from engine.model.weights.folder import Weights
from engine.model.weights.hub import LDM_FILES
from engine.model.weights.ldm_import import ldm_tables, to_ldm_state_dict
from engine.model.weights.ldm_names import EMA_PREFIX, ema_name, read_config

_NOT_STATED = ("encoder", "base_mpp", "magnifications", "scale")
"""What the layout leaves to its reader to know."""


def write_ldm(folder: Path, weights: Weights, raw_unet: dict[str, Tensor], decay: float, updates: int) -> None:
    """Write a model in the LDM layout, durably and whole.

    `weights` are the ones to sample with: their U-Net becomes the average (model_ema.…), beside `raw_unet` (in our
    names), the one in training; LDM keeps no average of the conditioner, so theirs is stored as it is.
    Raises: CheckpointError naming what the layout cannot express; CanvasError if the disk refuses.
    """
    document = ldm_config(weights.config)
    state = ldm_state(weights, raw_unet, decay, updates)
    checkpoint, config = LDM_FILES
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder, LDM_FILES) as partial:
        with (partial / checkpoint).open("wb") as file:
            torch.save(state, file)
        (partial / config).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def ldm_state(weights: Weights, raw_unet: dict[str, Tensor], decay: float, updates: int) -> dict[str, Tensor]:
    """Return every tensor under its published name, float32 and on the CPU."""
    averaged = to_ldm_state_dict(weights)
    raw = to_ldm_state_dict(Weights(weights.config, weights.networks | {"unet": raw_unet}))
    tables = ldm_tables(weights.config, weights.networks)
    state = {name: value.float() for name, value in schedule_buffers(weights.config).items()}
    state |= {name: raw[name] for name in tables["unet"]}
    device = next(iter(raw.values())).device
    state[f"{EMA_PREFIX}decay"] = torch.tensor(decay, dtype=torch.float32, device=device)
    state[f"{EMA_PREFIX}num_updates"] = torch.tensor(updates, dtype=torch.int32, device=device)
    state |= {ema_name(name): averaged[name] for name in tables["unet"]}
    state |= {name: averaged[name] for part in ("vae", "conditioner") for name in tables[part]}
    # Shapes that were reshaped share their storage with the model's: what is stored must stand alone.
    return {name: _plain(value) for name, value in state.items()}


def _plain(value: Tensor) -> Tensor:
    value = value.detach()
    if value.is_meta:
        return value.float() if value.is_floating_point() else value
    return value.to("cpu", torch.float32 if value.is_floating_point() else None).contiguous().clone()


def schedule_buffers(config: ModelConfig) -> dict[str, Tensor]:
    """Return the buffers LDM derives from its betas and stores, in float64."""
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64) ** 2
    bar = torch.cumprod(1 - betas, dim=0)
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    variance = betas * (1 - before) / (1 - bar)
    return {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - bar),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - bar),
    }


def ldm_config(config: ModelConfig) -> dict[str, Any]:
    """Return config.yaml's content. Raises CheckpointError naming what the layout cannot express."""
    document = {"model": {
        "base_learning_rate": 2.0e-05,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": _params(config),
    }}  # fmt: skip
    single = config.conditioner.kind == "token"
    try:
        back = read_config(document, 0 if single else len(config.magnifications), None)
    except ValueError as error:
        raise CheckpointError(f"the LDM layout cannot express this model: {error}") from error
    differing = []
    for name in (f.name for f in fields(ModelConfig) if f.name not in _NOT_STATED):
        ours, theirs = getattr(config, name), getattr(back, name)
        if isinstance(ours, dict):
            differing += [f"{name}.{k}={ours.get(k)!r}" for k in ours | theirs if ours.get(k) != theirs.get(k)]
        elif ours != theirs:
            differing.append(f"{name}={ours!r}")
    if differing:
        raise CheckpointError(
            f"the LDM layout must be able to express the model; it has no words for {', '.join(differing)}. Keep this "
            "model in our layout."
        )
    return document


def _params(config: ModelConfig) -> dict[str, Any]:
    params = {
        "linear_start": config.beta_start,
        "linear_end": config.beta_end,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": config.timesteps,
        "first_stage_key": "image",
        "cond_stage_key": "hybrid",
        "image_size": config.unet["sample_size"],
        "channels": config.unet["in_channels"],
        "cond_stage_trainable": True,
        "conditioning_key": "crossattn",
        "use_ema": True,
        "x_feat_extracted": True,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": _unet(config)},
        "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface", "params": _vae(config)},
        "cond_stage_config": _conditioner(config),
    }
    return params if config.scale_factor == 1 else params | {"scale_factor": config.scale_factor}


def _multipliers(channels: list[int]) -> list[int]:
    uneven = [c for c in channels if c % channels[0]]
    if uneven:
        raise CheckpointError(
            f"the LDM layout states widths as multiples of the first; {uneven[0]} is none of {channels[0]}. Keep this "
            "model in our layout."
        )
    return [c // channels[0] for c in channels]


def _unet(config: ModelConfig) -> dict[str, Any]:
    unet, channels = config.unet, config.unet["block_out_channels"]
    attends = [2**level for level, kind in enumerate(unet["down_block_types"]) if "CrossAttn" in kind]
    heads = unet["attention_head_dim"]
    per_head = {"num_heads": heads} if isinstance(heads, int) else {"num_head_channels": channels[0] // heads[0]}
    return {
        "use_checkpoint": False,
        "use_fp16": False,
        "image_size": unet["sample_size"],
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": channels[0],
        "attention_resolutions": attends[::-1],
        "num_res_blocks": unet["layers_per_block"],
        "channel_mult": _multipliers(channels),
        **per_head,
        "use_spatial_transformer": True,
        "transformer_depth": unet["transformer_layers_per_block"],
        "context_dim": unet["cross_attention_dim"],
    }


def _vae(config: ModelConfig) -> dict[str, Any]:
    vae, channels = config.vae, config.vae["block_out_channels"]
    dd = {
        "double_z": False,
        "z_channels": vae["latent_channels"],
        "resolution": vae["sample_size"],
        "in_channels": vae["in_channels"],
        "out_ch": vae["out_channels"],
        "ch": channels[0],
        "ch_mult": _multipliers(channels),
        "num_res_blocks": vae["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    return {"embed_dim": vae["vq_embed_dim"], "n_embed": vae["num_vq_embeddings"], "ddconfig": dd, "lossconfig": loss}


def _conditioner(config: ModelConfig) -> dict[str, Any]:
    c, modules = config.conditioner, "ldm.modules.encoders.modules."
    if c.kind == "summarizer":
        params = {
            "feat_key": "ssl_feat",
            "mag_key": "mag",
            "num_layers": c.layers,
            "input_channels": config.ssl_dim,
            "hidden_channels": c.width,
            "vit_mlp_dim": c.mlp,
            "output_channels": c.output_dim,
            "p_uncond": 0.1,
        }
        return {
            "target": modules + "EmbeddingViT2_5",
            "params": params | ({} if c.heads == 8 else {"num_heads": c.heads}),
        }
    if c.region_dim:
        params = {"patch_embed_dim": config.ssl_dim, "region_embed_dim": c.region_dim, "normalize_ssl": c.normalize}
        return {"target": modules + "SSLEmbedder", "params": params}
    keyed = {"patch_ssl_key": "feat_patch", "patch_embed_dim": config.ssl_dim}
    params = keyed | {"target_dim": c.output_dim, "normalize_ssl": c.normalize}
    return {"target": modules + "PatchEmbedder", "params": params}
