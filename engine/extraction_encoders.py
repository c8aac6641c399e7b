"""The encoders that an extraction names, and the magnifications they know. It does not know slides or bags."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.devices import torch_dtype
from engine.errors import EngineError
from engine.extraction_config import ExtractConfig
from engine.features import DiffusionEncoder, SSLTileEncoder, TileEncoder
from engine.model import checkpoint, hub
from engine.model.encoders import DEMO, load_encoder
from engine.model.zoomldm import ZoomLDM
from engine.slides.grid import PARENT_FACTOR

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
    scale = checkpoint.read(hub.locate(config.model.source, config.model.variant)).config.scale
    coarse = [name for name in scale.names if scale.factor(name) == PARENT_FACTOR]
    if abs(config.grid.mpp / scale.base_mpp - 1) > 0.01 or not coarse:
        raise EngineError(
            f"grid.mpp must be the model's base of {scale.base_mpp:g} µm/px, and it must know a magnification "
            f"{PARENT_FACTOR} times coarser; got {config.grid.mpp:g} and {', '.join(scale.names)}. Set --grid.mpp."
        )
    return scale.base, coarse[0]


def load_encoders(config: ExtractConfig, device: str) -> list[TileEncoder]:
    """Load all encoders in their order. Raises: CheckpointError; ValueError for unknown names, blocks or timesteps."""
    section, own = config.model, config.features.condition == "own"
    dtype = torch_dtype(section.dtype)
    model: ZoomLDM | None = None
    if ZOOMLDM in config.encoders or DEMO in config.encoders:
        model = ZoomLDM.from_pretrained(section.source, section.variant, dtype=dtype)
        model = (model.channels_last() if section.channels_last else model).to(device)
    named = [name for name in config.encoders if name != ZOOMLDM]
    conditioner = model.config.encoder if model is not None and ZOOMLDM in config.encoders and own else None
    found = {}
    if conditioner is not None and conditioner not in named:
        named.append(conditioner)
    for name in named:
        # With several, the folder is that of the one the model is conditioned on.
        source = section.encoder_source if name == conditioner or len(named) == 1 else None
        found[name] = load_encoder(name, source, model.extras if model is not None else {}, device, dtype)
    encoders: list[TileEncoder] = []
    for name in config.encoders:
        if name == ZOOMLDM:
            assert model is not None
            encoders.append(DiffusionEncoder(model, config.features, found.get(conditioner or "")))
        else:
            encoders.append(SSLTileEncoder(found[name], config.features.batch))
    return encoders


def describe(config: ExtractConfig) -> dict[str, EncoderFacts]:
    """Return what bags say about each encoder; loads and forgets the weights. Raises EngineError."""
    try:
        return {e.id: EncoderFacts(e.dim, e.attributes()) for e in load_encoders(config, "cpu")}
    except ValueError as error:
        raise EngineError(f"features, encoders and model must fit together: {error}") from error
