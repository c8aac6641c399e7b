"""The autoencoder and the SSL encoder that a training set is prepared with. It does not know slides or the set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engine.core.errors import EngineError
from engine.core.runtime import torch_dtype
from engine.datasets.config import PrepareConfig
from engine.datasets.schema import SetFacts
from engine.model.encoders.base import SSLEncoder, digest_of
from engine.model.encoders.registry import describe_encoder, load_encoder
from engine.model.weights import hub, ldm_import
from engine.model.zoomldm import ZoomLDM


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
    """Return what the prepared set shares; no network gets the weights.

    Raises: CheckpointError when they cannot be had; EngineError if the model is one of another domain.
    """
    section = config.model
    model = ldm_import.read(hub.locate(section.source, section.variant))
    with _named_encoder():
        ssl = describe_encoder(model.config.encoder, section.encoder_source, model.extras)  # digests are of float32
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
        autoencoder_digest=digest_of(model.networks["vae"], torch.float32),
        scale_factor=model.config.scale_factor,
    )


def _load(config: PrepareConfig, device: str, dtype: torch.dtype) -> tuple[ZoomLDM, SSLEncoder]:
    section = config.model
    model = ZoomLDM.from_pretrained(section.source, section.variant, dtype=dtype)
    with _named_encoder():
        return model, load_encoder(model.config.encoder, section.encoder_source, model.extras, device, dtype)


@contextmanager
def _named_encoder() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise EngineError(f"the model must name an SSL encoder to prepare with; {error}") from error
