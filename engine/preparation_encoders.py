"""The autoencoder and the SSL encoder that a training set is prepared with. It does not know slides or the set."""

import torch
from torch import nn

from engine.devices import torch_dtype
from engine.errors import EngineError
from engine.model.encoders import load_encoder
from engine.model.ssl_encoder import SSLEncoder
from engine.model.zoomldm import ZoomLDM, autoencoder_digest
from engine.preparation_config import PrepareConfig
from engine.prepared_facts import SetFacts


def load_networks(config: PrepareConfig, device: str) -> tuple[ZoomLDM, SSLEncoder]:
    """Load the model, of which only the autoencoder is kept, and its SSL encoder. Raises EngineError."""
    section = config.model
    model, ssl = _load(config, device, torch_dtype(section.dtype))
    if section.channels_last:
        model.channels_last()
    for other in (model.unet, model.conditioner):
        nn.Module.to(other, "meta")
    nn.Module.to(model.vae, device)  # keeps the types, so the codebook stays float32
    return model, ssl


def set_facts(config: PrepareConfig) -> SetFacts:
    """Return what the prepared set shares; loads and forgets the weights.

    Raises: CheckpointError when they cannot be had; EngineError if the model is one of another domain.
    """
    model, ssl = _load(config, "cpu", torch.float32)  # digests are those of float32
    scale, base = config.scale, model.config.scale.base_mpp
    if abs(base / scale.base_mpp - 1) > 0.01:
        raise EngineError(
            f"the model must be one of the domain {config.domain}, whose base is {scale.base_mpp:g} µm/px; that of "
            f"{config.model.source} is {base:g}. Choose another --domain, or --model.source and --model.variant."
        )
    return SetFacts(
        domain=config.domain,
        magnifications=scale.names,
        base_mpp=scale.base_mpp,
        encoder=model.config.encoder,
        encoder_digest=ssl.digest,
        ssl_dim=ssl.dim,
        autoencoder_digest=autoencoder_digest(model),
        scale_factor=model.config.scale_factor,
    )


def _load(config: PrepareConfig, device: str, dtype: torch.dtype) -> tuple[ZoomLDM, SSLEncoder]:
    section = config.model
    model = ZoomLDM.from_pretrained(section.source, section.variant, dtype=dtype)
    try:
        ssl = load_encoder(model.config.encoder, section.encoder_source, model.extras, device, dtype)
    except ValueError as error:
        raise EngineError(f"the model must name an SSL encoder to prepare with; {error}") from error
    return model, ssl
