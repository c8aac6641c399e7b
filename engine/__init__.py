"""ZoomLDM engine: large, coherent pictures, features of slides, and training; without Ray unless it is asked for.

    import engine
    run = engine.generate(engine.load_config("configs/demo.yaml", output={"folder": "runs/notebook"}))

Names are loaded when they are first used, so `import engine` is cheap and needs no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from engine.core import exits as _exits

_exits.leave_early_on_signals()  # this is the first module of every command, and imports take seconds

__version__ = "0.1.0"

if TYPE_CHECKING:
    from engine.api.arrays import LazyPicture as LazyPicture
    from engine.api.arrays import open_picture as open_picture
    from engine.api.learning import quality as quality
    from engine.api.learning import sample_tiles as sample_tiles
    from engine.api.learning import train as train
    from engine.api.runs import Run as Run
    from engine.api.runs import enlarge as enlarge
    from engine.api.runs import generate as generate
    from engine.api.runs import load_config as load_config
    from engine.api.slides import extract_features as extract_features
    from engine.api.slides import prepare_dataset as prepare_dataset
    from engine.core.errors import EngineError as EngineError
    from engine.datasets.dataset import PreparedSet as TrainingSet  # noqa: F401
    from engine.features.bag_reader import BagFile as Bag  # noqa: F401
    from engine.model.zoomldm import ZoomLDM as ZoomLDM
    from engine.sampling.config import RunConfig as RunConfig
    from engine.sampling.denoiser import LocalDenoiser as LocalDenoiser
    from engine.slides.slide import Slide as Slide
    from engine.slides.slide import open_slide as open_slide

_NAMES = {
    "Bag": "engine.features.bag_reader:BagFile",
    "EngineError": "engine.core.errors:EngineError",
    "LazyPicture": "engine.api.arrays:LazyPicture",
    "LocalDenoiser": "engine.sampling.denoiser:LocalDenoiser",
    "Run": "engine.api.runs:Run",
    "RunConfig": "engine.sampling.config:RunConfig",
    "Slide": "engine.slides.slide:Slide",
    "TrainingSet": "engine.datasets.dataset:PreparedSet",
    "ZoomLDM": "engine.model.zoomldm:ZoomLDM",
    "enlarge": "engine.api.runs:enlarge",
    "extract_features": "engine.api.slides:extract_features",
    "generate": "engine.api.runs:generate",
    "load_config": "engine.api.runs:load_config",
    "open_picture": "engine.api.arrays:open_picture",
    "open_slide": "engine.slides.slide:open_slide",
    "prepare_dataset": "engine.api.slides:prepare_dataset",
    "quality": "engine.api.learning:quality",
    "sample_tiles": "engine.api.learning:sample_tiles",
    "train": "engine.api.learning:train",
}
"""Public name → where it lives."""
__all__ = [  # noqa: F822  # all but the version are loaded by __getattr__
    "Bag",
    "EngineError",
    "LazyPicture",
    "LocalDenoiser",
    "Run",
    "RunConfig",
    "Slide",
    "TrainingSet",
    "ZoomLDM",
    "__version__",
    "enlarge",
    "extract_features",
    "generate",
    "load_config",
    "open_picture",
    "open_slide",
    "prepare_dataset",
    "quality",
    "sample_tiles",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name (PEP 562)."""
    if name not in _NAMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}; public names are {', '.join(_NAMES)}.")
    module, _, inner = _NAMES[name].partition(":")
    value = getattr(import_module(module), inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """The package, whose functions `train`, `quality` and `extract_features` outlive the commands of the same names."""

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the command engine.train would put its module where the function is.
        if not (isinstance(value, ModuleType) and name in _NAMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
