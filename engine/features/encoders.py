"""The encoders that an extraction names, the magnifications they know, and how one process loads them.

It does not know slides or bags.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.core.errors import EngineError
from engine.core.runtime import torch_dtype
from engine.features.blocks import BlockEncoder, ExtractTask, SlideWorker
from engine.features.config import ExtractConfig
from engine.features.tile_encoders import (
    DiffusionEncoder,
    SSLTileEncoder,
    TileEncoder,
    diffusion_attributes,
    diffusion_width,
    ssl_attributes,
)
from engine.model.config import ModelConfig
from engine.model.encoders.registry import DEMO, describe_encoder, load_encoder
from engine.model.weights import folder, hub, ldm_import
from engine.model.zoomldm import ZoomLDM
from engine.pipeline.stages import Backend, local_backend
from engine.slides.slide import Slide
from engine.slides.tile_grid import PARENT_FACTOR

ZOOMLDM = "zoomldm"


@dataclass(frozen=True)
class EncoderFacts:
    """What bags say about an encoder."""

    dim: int
    attributes: Mapping[str, Any]


def scale_names(config: ExtractConfig) -> tuple[str, str]:
    """Return the names of the fine and the coarse magnification: ("20x", "5x").

    Raises: EngineError if the tiles are not of the model's base µm/px; CheckpointError when it cannot be had.
    """
    scale = ldm_import.config_of(hub.locate(config.model.source, config.model.variant)).scale
    coarse = [name for name in scale.names if scale.factor(name) == PARENT_FACTOR]
    if abs(config.grid.mpp / scale.base_mpp - 1) > 0.01 or not coarse:
        raise EngineError(
            f"grid.mpp must be the model's base of {scale.base_mpp:g} µm/px, and it must know a magnification "
            f"{PARENT_FACTOR} times coarser; got {config.grid.mpp:g} and {', '.join(scale.names)}. Set --grid.mpp."
        )
    return scale.base, coarse[0]


def load_encoders(config: ExtractConfig, device: str) -> list[TileEncoder]:
    """Load all encoders in their order. Raises: CheckpointError; ValueError for unknown names, blocks or timesteps."""
    section, dtype = config.model, torch_dtype(config.model.dtype)
    model: ZoomLDM | None = None
    if _needs_model(config):
        model = ZoomLDM.from_pretrained(section.source, section.variant, dtype=dtype)
        model = (model.channels_last() if section.channels_last else model).to(device)
    conditioner = _conditioner(config, None if model is None else model.config)
    extras = {} if model is None else model.extras
    found = {n: load_encoder(n, source, extras, device, dtype) for n, source in _sources(config, conditioner).items()}
    encoders: list[TileEncoder] = []
    for name in config.encoders:
        if name == ZOOMLDM:
            assert model is not None
            encoders.append(DiffusionEncoder(model, config.features, found.get(conditioner or "")))
        else:
            encoders.append(SSLTileEncoder(found[name], config.features.batch))
    return encoders


def describe(config: ExtractConfig) -> dict[str, EncoderFacts]:
    """Return what bags say about each encoder that `load_encoders` would load; no network gets the weights.

    Raises: EngineError.
    """
    try:
        return _describe(config)
    except ValueError as error:
        raise EngineError(f"features, encoders and model must fit together: {error}") from error


def _describe(config: ExtractConfig) -> dict[str, EncoderFacts]:
    section, dtype = config.model, torch_dtype(config.model.dtype)
    weights = ldm_import.read(hub.locate(section.source, section.variant)) if _needs_model(config) else None
    conditioner = _conditioner(config, None if weights is None else weights.config)
    extras = {} if weights is None else weights.extras
    found = {n: describe_encoder(n, source, extras, dtype) for n, source in _sources(config, conditioner).items()}
    facts = {}
    for name in config.encoders:
        if name == ZOOMLDM:
            assert weights is not None
            width = diffusion_width(weights.config, config.features, found.get(conditioner or ""))
            facts[name] = EncoderFacts(width, diffusion_attributes(config.features, folder.digest(weights, dtype)))
        else:
            facts[name] = EncoderFacts(found[name].dim, ssl_attributes(name, found[name].digest))
    return facts


def _needs_model(config: ExtractConfig) -> bool:
    return ZOOMLDM in config.encoders or DEMO in config.encoders


def _conditioner(config: ExtractConfig, model: ModelConfig | None) -> str | None:
    """Return the SSL encoder whose vectors condition the U-Net, if it is one that does."""
    wanted = ZOOMLDM in config.encoders and config.features.condition == "own"
    return model.encoder if model is not None and wanted else None


def _sources(config: ExtractConfig, conditioner: str | None) -> dict[str, str | None]:
    """Return the SSL encoders that are needed, each with the folder or Hub id that the user names for it."""
    named = [name for name in config.encoders if name != ZOOMLDM]
    if conditioner is not None and conditioner not in named:
        named.append(conditioner)
    # With several, the folder is that of the one the model is conditioned on.
    given = config.model.encoder_source
    return {name: given if name == conditioner or len(named) == 1 else None for name in named}


@dataclass(frozen=True)
class ExtractStages:
    """Slides → plans and blocks → pixels → vectors, at two magnifications."""

    config: ExtractConfig
    names: tuple[str, str]
    given: tuple[Slide, ...] = ()
    """Slides of this process that no path leads to; never with Ray."""

    def worker(self) -> SlideWorker:
        return SlideWorker(self.config, self.names, self.given)

    def encoder(self, device: str) -> BlockEncoder:
        return BlockEncoder(load_encoders(self.config, device))


@contextmanager
def extract_alone(
    config: ExtractConfig, names: tuple[str, str], given: tuple[Slide, ...] = ()
) -> Iterator[Backend[ExtractTask]]:
    """Compute here, without Ray (ray.enabled=false); `given` slides are open already."""
    with local_backend(ExtractStages(config, names, given)) as backend:
        yield backend
