"""One network's weights from whatever file holds them: our folder, diffusers' folder, or an LDM checkpoint.

It does not know training. Nothing is unpickled but tensors. Source: checkpoint.py and ldm_layout.py for the names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from engine.core.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.weights import hub
from engine.model.weights.folder import check_fit, expected_shapes, read_safetensors
from engine.model.weights.ldm_import import ldm_tables, load_tensors
from engine.model.weights.ldm_names import CONDITIONER_PREFIX, UNET_PREFIX, VAE_PREFIX, ema_name

PartName = Literal["unet", "vae", "conditioner"]
_PREFIX = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "conditioner": CONDITIONER_PREFIX}
_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


def load_part(network: nn.Module, part: PartName, source: str, config: ModelConfig) -> None:
    """Put a part's weights into its network.

    source: a folder that diffusers or we wrote (the part's own or the one above it), a folder in the LDM layout, an
    LDM checkpoint file, whose names may lack the part's prefix (an autoencoder alone), or "demo" or a Hub id.
    Raises: CheckpointError naming the first tensors that are missing, unknown or misshapen.
    """
    network.load_state_dict(read_part_weights(part, source, config))


def read_part_weights(part: PartName, source: str, config: ModelConfig) -> dict[str, Tensor]:
    """Return a part's state dict in our names, checked to fit. See load_part."""
    wanted = expected_shapes(config)[part]
    path = Path(source)
    if path.is_file():
        return _from_ldm(part, path, config)
    if (path / _DIFFUSERS_FILE).is_file():
        return _checked(read_safetensors(path / _DIFFUSERS_FILE), wanted, str(path))
    inside = path / hub.NETWORK_FILES[part]
    if not inside.is_file() and not (path / hub.LDM_FILES[0]).is_file():
        path = hub.locate(source, flag=f"--initial.{part}")
        inside = path / hub.NETWORK_FILES[part]
    if inside.is_file():
        return _checked(read_safetensors(inside), wanted, str(inside))
    return _from_ldm(part, path / hub.LDM_FILES[0], config)


def _from_ldm(part: PartName, path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Read the part's tensors of an LDM checkpoint; of the U-Net the averaged ones, where the file has them."""
    tensors = load_tensors(path)
    shapes = expected_shapes(config)
    table = ldm_tables(config, shapes)[part]
    prefix = _PREFIX[part]
    averaged = {ema_name(name): target for name, target in table.items()}
    if part == "unet" and any(name.startswith("model_ema.diffusion_model") for name in tensors):
        own = {name: t for name, t in tensors.items() if name.startswith("model_ema.diffusion_model")}
        table = averaged
    elif any(name.startswith(prefix) for name in tensors):
        own = {name: t for name, t in tensors.items() if name.startswith(prefix)}
    else:  # the file of this network alone
        table = {name.removeprefix(prefix): target for name, target in table.items()}
        own = dict(tensors)
    # What an autoencoder's training leaves beside it: discriminator and perceptual loss.
    own = {name: t for name, t in own.items() if not name.removeprefix(prefix).startswith("loss.")}
    wanted = {name: shapes[part][target] for name, target in table.items()}
    fitting = {name: _squeezed(t, wanted.get(name)) for name, t in own.items()}
    return {table[name]: tensor.clone() for name, tensor in _checked(fitting, wanted, str(path)).items()}


def _squeezed(tensor: Tensor, wanted: torch.Size | None) -> Tensor:
    """Return a 1×1 convolution's weight as a linear layer's, where one is wanted."""
    return tensor[:, :, 0, 0] if wanted is not None and len(wanted) == 2 and tensor.shape[2:] == (1, 1) else tensor


def _checked(found: dict[str, Tensor], wanted: Mapping[str, torch.Size], where: str) -> dict[str, Tensor]:
    check_fit({name: tensor.shape for name, tensor in found.items()}, wanted, where)
    spoilt = [name for name, tensor in found.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if spoilt:
        raise CheckpointError(f"{where} must hold finite weights; {', '.join(spoilt[:5])} do not.")
    return found
