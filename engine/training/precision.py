"""The arithmetic of a training: chosen where the configuration says auto, kept where the run has begun.

It knows the two ways in which configurations say it, and no lesson.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from engine.core.runtime import AUTO, Ask, choose_dtype, remark_on_dtype, settle_dtype, this_process
from engine.training.denoiser.settings import LearningConfig
from engine.training.optimisation import TrainingError
from engine.training.settings import TrainingConfig

log = logging.getLogger(__name__)
L = TypeVar("L", bound=LearningConfig)
S = TypeVar("S", bound=TrainingConfig)


def settle_precision(config: L, ask: Ask) -> L:
    """Settle `precision`, which decides the weights; `ask` tells what workers compute on. Raises: EngineError."""
    begun = _begun(config.run, "precision") if config.precision == AUTO else None
    precision = settle_dtype(config.precision, lambda: begun, ask)
    if config.precision == AUTO:
        log.info("precision: %s", precision)
    if begun is not None and (line := remark_on_dtype(AUTO, begun, ask(), "precision")):
        log.warning(line)
    return replace(config, precision=precision)  # type: ignore[arg-type]  # one of the key's names


def settle_bfloat16(config: S) -> S:
    """Settle `bfloat16` of a training in this process. Raises: EngineError without the GPU that is asked for."""
    hardware, wanted = this_process(config.device)(), config.bfloat16
    if wanted == AUTO:
        begun = _begun(config.run, "bfloat16")
        wanted = choose_dtype(hardware).dtype == "bfloat16" if begun is None else bool(begun)
        log.info("bfloat16: %s", wanted)
    if line := remark_on_dtype("", "bfloat16" if wanted else "float32", hardware, "bfloat16"):
        log.warning(line)
    return replace(config, bfloat16=wanted)


def _begun(run: str, key: str) -> str | None:
    """Return what config.json of a run says of a key; None before there is one. Raises: TrainingError."""
    path = Path(run) / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{path} must say how the run is made; {error!r}. Restore it, or name another run."
        ) from error
