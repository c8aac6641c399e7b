"""Bags of features in, a classifier and its evidence out; knows no Ray and no diffusion; slides only to show them.

    import mil
    bags = mil.load_bags("runs/features/features", scales=("20x", "5x"))
    classifier = mil.MILClassifier().fit(bags, labels, groups=patients)

Names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.core import exits as _exits

_exits.leave_early_on_signals()  # as engine does

if TYPE_CHECKING:
    from mil.data.dataset import load_bags as load_bags
    from mil.fit.classifier import MILClassifier as MILClassifier

_NAMES = {"MILClassifier": "mil.fit.classifier", "load_bags": "mil.data.dataset"}
"""Public name → the module it lives in."""
__all__ = ["MILClassifier", "load_bags"]


def __getattr__(name: str) -> Any:
    """Load a public name (PEP 562)."""
    if name not in _NAMES:
        raise AttributeError(f"module 'mil' has no attribute {name!r}; public names are {', '.join(_NAMES)}.")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
