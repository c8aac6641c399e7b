"""Training, single tiles and figures from Python.

Nothing here reads a command line or ends the process; mistakes raise EngineError.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine._backends.training import train_model
from engine.api.runs import picture_file, shown_progress
from engine.core.cli import configured, stored_value
from engine.core.errors import ConfigError
from engine.core.files import RunLock
from engine.evaluation.compare import Comparison
from engine.evaluation.config import QualityConfig
from engine.evaluation.protocols import evaluate
from engine.generation.tiles import SampleConfig, draw
from engine.model.zoomldm import ZoomLDM
from engine.training.tasks import TASKS

if TYPE_CHECKING:
    import dask.array as da


def train(config: str | Path, **changes: Any) -> Path:
    """Train, or continue, what a YAML file's `task` says, with `changes` over its keys; return the run folder.

    Raises: ConfigError; EngineError. The last checkpoint survives whatever ends it.

    >>> import engine, numpy as np, PIL.Image
    >>> from pathlib import Path
    >>> Path("slides").mkdir(exist_ok=True)
    >>> tissue = np.random.default_rng(0).integers((150, 50, 130), (220, 130, 200), (512, 512, 3)).astype(np.uint8)
    >>> PIL.Image.fromarray(tissue).save("slides/case_7.png")
    >>> place = {"out": "runs/set", "backend": "local", "progress": False}
    >>> data = engine.prepare_dataset("slides", **place, mpp=0.5, coarsest="1.25x")
    >>> short = {"steps": 1, "batch_size": 1, "magnification_weights": [1, 1, 0, 0, 0]}
    >>> alone = {"heldout": {"data": None}, "ray": {"enabled": False}}
    >>> place = {"data": "runs/set", "run": "runs/train", "output": {"folder": "runs/train/model"}}
    >>> run = engine.train("configs/train_demo_refine.yaml", initial={"model": "demo"}, train=short, **place, **alone)
    >>> (run / "model" / "config.json").is_file()
    True
    """
    name = str(changes.get("task", stored_value(config, "task", next(iter(TASKS)))))
    if name not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}; got {name!r}.")
    task = TASKS[name]
    asked = configured(task.schema, config, changes)
    with RunLock(Path(asked.run), "run"):
        (task.train if task.export is None else train_model)(asked)
    return Path(asked.run)


def sample_tiles(
    model: ZoomLDM | str = "demo",
    magnification: str | None = None,
    *,
    count: int = 16,
    condition: str = "reference",
    seed: int = 0,
    config: str | Path | None = None,
    **changes: Any,
) -> np.ndarray:
    """Draw single tiles at one of the model's magnifications: uint8 (count, 256, 256, 3).

    `model` is a loaded one or a source (demo, a folder, a Hub id); `condition` is reference (the demo's own, or
    `reference=FILE`, `embeddings=FILE`) or cdm. Other keys are those of `python -m engine.sample`.
    Raises: ConfigError; EngineError.

    >>> import engine
    >>> tiles = engine.sample_tiles("demo", "5x", count=2, steps=2, sampling={"batch_size": 2})
    >>> tiles.shape, tiles.dtype
    ((2, 256, 256, 3), dtype('uint8'))
    """
    keys = {"magnification": magnification, "count": count, "condition": condition, **changes}
    sampling = {"seed": seed, **(changes.get("sampling") or {})}
    source = {} if isinstance(model, ZoomLDM) else {"source": model}
    keys |= {"sampling": sampling, "model": {**source, **(changes.get("model") or {})}}
    asked = configured(SampleConfig, config, keys)
    try:
        return np.stack([tile for _, tile, _ in draw(asked, model if isinstance(model, ZoomLDM) else None)])
    except ValueError as error:  # a magnification that the model has not
        raise ConfigError(str(error)) from error


def quality(
    a: "str | Path | np.ndarray | da.Array",
    b: "str | Path | np.ndarray | da.Array | None" = None,
    *,
    progress: bool = True,
    **changes: Any,
) -> Comparison:
    """Say how good pictures are: A by itself, or beside B. Keys are those of `python -m engine.quality`.

    Both may be arrays, uint8 (h, w, 3) or (3, h, w); they need `mpp` (µm/px), and are kept as PNG in `out`.
    Raises: ConfigError for sets that cannot be compared; EngineError.

    >>> import engine, numpy as np
    >>> grey, noise = np.full((512, 512, 3), 160), np.random.default_rng(0).integers(-40, 40, (512, 512, 3))
    >>> rough, smooth = (grey + noise).astype(np.uint8), (grey + noise // 8).astype(np.uint8)
    >>> quick = {"encoder": "texture", "directions": 20, "kid_subsets": 5, "stride": 128, "progress": False}
    >>> found = engine.quality(rough, smooth, mpp=0.5, out="runs/quality", **quick)
    >>> [figure.name for figure in found.figures][:2]
    ['Fréchet distance (texture)', 'KID']
    """
    out = Path(changes.get("out", QualityConfig.out))
    found = {name: picture_file(set_, out / f"{name}.png") for name, set_ in (("a", a), ("b", b)) if set_ is not None}
    keys = {"b": None, **{name: str(path) for name, path in found.items()}, **changes}
    try:
        return evaluate(configured(QualityConfig, None, keys), shown_progress(progress))
    except ValueError as error:
        raise ConfigError(str(error)) from error
