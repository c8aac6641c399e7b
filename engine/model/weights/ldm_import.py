"""The published LDM layout → ours: every tensor accounted for by name and shape, and nothing unpickled but tensors.

It does not know where the folder came from. The U-Net's weights are the EMA ones where the file has them; LDM keeps
an average of the U-Net only, so autoencoder and conditioner have one version.
Source: ZoomLDM's weights.ckpt (a flat state dict) and Lightning's form of it ({"state_dict": …}).
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.weights import folder as ours
from engine.model.weights.folder import Weights, check_fit, expected_shapes, read_folder
from engine.model.weights.hub import LDM_FILES, OUR_CONFIG
from engine.model.weights.ldm_names import (
    CONDITIONER_PREFIX,
    EMA_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    ema_name,
    read_config,
    unet_table,
    vae_table,
)

WeightsChoice = Literal["ema", "raw"]

# Tensors a training run leaves in the file that sampling does not need. Everything else unknown is an error.
_BOOKKEEPING = re.compile(
    "|".join(
        (
            r"betas|(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev)?",  # from linear_start, _end
            r"posterior_(variance|log_variance_clipped|mean_coef[12])",  # likewise
            r"logvar|lvlb_weights",  # weights of the training loss
            r"scale_factor",  # read into the config
            r"model_ema\.(decay|num_updates)",  # how the average was taken, not the average
            r"first_stage_model\.loss\..*",  # perceptual loss and discriminator of the autoencoder's training
        )
    )
)


def read(folder: Path, weights: WeightsChoice = "ema") -> Weights:
    """Read a model from a folder in either layout. `weights` matters only where a file has EMA and raw ones.

    Raises: CheckpointError naming the file and what is wrong with it.
    """
    return read_folder(folder) if (folder / OUR_CONFIG).is_file() else read_ldm(folder, weights)


def config_of(folder: Path) -> ModelConfig:
    """Return what the model of a folder in either layout is; reads no weights. Raises as `read`."""
    if (folder / OUR_CONFIG).is_file():
        return ours.read_config(folder)
    return _ldm_config(folder, _ldm_tensors(folder / LDM_FILES[0]))  # mapped: one tensor's shape and one number


def read_ldm(folder: Path, weights: WeightsChoice = "ema") -> Weights:
    """Read `weights.ckpt` and `config.yaml` of the published layout."""
    if weights not in get_args(WeightsChoice):
        raise ValueError(f"weights must be one of {get_args(WeightsChoice)}; got {weights!r}.")
    checkpoint = folder / LDM_FILES[0]
    tensors = _ldm_tensors(checkpoint)
    config = _ldm_config(folder, tensors)
    return Weights(config, convert(tensors, config, weights, str(checkpoint)))


def _ldm_tensors(checkpoint: Path) -> dict[str, Tensor]:
    tensors = load_tensors(checkpoint)
    if not any(name.startswith((UNET_PREFIX, EMA_PREFIX, VAE_PREFIX)) for name in tensors):
        raise CheckpointError(
            f"{checkpoint} must be an LDM checkpoint ({UNET_PREFIX}…, {VAE_PREFIX}…); it holds other tensors: "
            f"{', '.join(list(tensors)[:5])}."
        )
    return tensors


def _ldm_config(folder: Path, tensors: Mapping[str, Tensor]) -> ModelConfig:
    config_path = folder / LDM_FILES[1]
    embedding = tensors.get(CONDITIONER_PREFIX + "mag_embedding.weight")
    stored_scale = tensors.get("scale_factor")
    try:
        document = yaml.safe_load(config_path.read_text(encoding="utf-8"))
        return read_config(
            document,
            magnifications=0 if embedding is None else embedding.shape[0],
            scale_factor=None if stored_scale is None else float(stored_scale),
        )
    except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
        raise CheckpointError(f"{config_path} does not describe a ZoomLDM: {error}") from error


def load_tensors(path: Path, inside: str = "state_dict") -> dict[str, Tensor]:
    """Load a state dict on the CPU without running anything the file contains.

    It may lie under the key `inside` of what is stored.
    Raises: CheckpointError if it is missing, damaged, needs more than tensors, or is not a state dict.
    """
    try:
        # Mapped, not read: only the tensors that are used get copied later (half of a file with EMA weights).
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no plain state dict: reading it would mean running code from the file, which is refused. "
            f"Store the tensors alone, e.g. torch.save(model.state_dict(), …). ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise CheckpointError(f"{path} is missing, truncated or damaged: {reason}; fetch it again.") from error
    state = loaded.get(inside, loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} must hold a state dict; it holds {type(state).__name__}.")
    odd = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{path} must hold tensors by name; these are none: {', '.join(odd[:5])}.")
    return state


def convert(
    tensors: Mapping[str, Tensor], config: ModelConfig, weights: WeightsChoice, where: str
) -> dict[str, dict[str, Tensor]]:
    """Rename the tensors of an LDM state dict into the state dicts of the three networks.

    Raises: CheckpointError naming the first five tensors that are missing, unknown or misshapen, in the file's names.
    """
    shapes = expected_shapes(config)
    tables = ldm_tables(config, shapes)
    _check_schedule(tensors, config, where)
    has_ema = any(name.startswith(f"{EMA_PREFIX}diffusion_model") for name in tensors)
    averaged = {ema_name(name): target for name, target in tables["unet"].items()}
    unused = tables["unet"] if weights == "ema" and has_ema else averaged
    if unused is tables["unet"]:
        tables["unet"] = averaged
    found = {
        name: tensor for name, tensor in tensors.items() if name not in unused and not _BOOKKEEPING.fullmatch(name)
    }
    wanted = {n: shapes[part][target] for part, table in tables.items() for n, target in table.items()}
    check_fit({n: _linear_shape(t, wanted.get(n)) for n, t in found.items()}, wanted, where)
    return {
        part: {target: found[n].reshape(wanted[n]) for n, target in table.items()} for part, table in tables.items()
    }


def ldm_tables(config: ModelConfig, shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return, by network, full LDM names → our names. Unique in both directions."""
    return {
        "unet": {UNET_PREFIX + n: t for n, t in unet_table(shapes["unet"], config).items()},
        "vae": {VAE_PREFIX + n: t for n, t in vae_table(shapes["vae"], config).items()},
        "conditioner": {CONDITIONER_PREFIX + n: n for n in shapes["conditioner"]},
    }


def to_ldm_state_dict(weights: Weights) -> dict[str, Tensor]:
    """Return a model's tensors under the published names (no EMA, no schedule): the inverse of `convert`."""
    state = {}
    for part, table in ldm_tables(weights.config, weights.networks).items():
        for name, target in table.items():
            tensor = weights.networks[part][target]
            # LDM writes the autoencoder's attention as 1×1 convolutions.
            pointwise = ".attn_1." in name and tensor.ndim == 2
            state[name] = tensor[:, :, None, None] if pointwise else tensor
    return state


def _linear_shape(tensor: Tensor, wanted: torch.Size | None) -> torch.Size:
    """Return the shape, a 1×1 convolution counting as a linear layer where one is wanted."""
    if wanted is not None and len(wanted) == 2 and tensor.shape[2:] == (1, 1):
        return tensor.shape[:2]
    return tensor.shape


def _check_schedule(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> None:
    stored = tensors.get("betas")
    if stored is None or stored.is_meta:
        return
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64) ** 2
    if stored.shape != betas.shape or not torch.allclose(stored.double(), betas, rtol=1e-4):
        raise CheckpointError(f"{where} was trained with another noise schedule than its config says.")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
