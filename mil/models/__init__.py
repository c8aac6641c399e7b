"""Models of bags, by name; all of them keep the contract in contract.py."""

from difflib import get_close_matches

from mil.models.abmil import ABMIL, BranchedABMIL
from mil.models.clam import CLAMSB
from mil.models.contract import BagModel, BagOutput, ModelConfig
from mil.models.dsmil import DSMIL
from mil.models.simlp import SiMLP
from mil.models.transmil import TransMIL

__all__ = ["MODELS", "BagModel", "BagOutput", "ModelConfig", "build_model"]

MODELS: dict[str, type[BagModel]] = {
    "abmil": ABMIL,
    "abmil_branches": BranchedABMIL,
    "clam_sb": CLAMSB,
    "dsmil": DSMIL,
    "simlp": SiMLP,
    "transmil": TransMIL,
}


def build_model(config: ModelConfig) -> BagModel:
    """Return an untrained model. Raises ValueError for an unknown name, naming the nearest."""
    if config.name not in MODELS:
        near = get_close_matches(config.name, MODELS, 1, cutoff=0.0)[0]
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {config.name!r}. Did you mean {near}?")
    return MODELS[config.name](config)
