"""Where a run computes, on which libraries and in which arithmetic: what it began with, and whether that still holds.

Invariant: `auto` is settled once, before a weight is read; from then on the run's folder says what it was. It does not
know what is computed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from engine.config import RunConfig
from engine.devices import Ask, Hardware, choose_device, choose_dtype, hardware_of
from engine.errors import CanvasError, CanvasMismatchError
from engine.state import write_atomically
from engine.storage import FolderStorage, Storage

ENVIRONMENT = "environment.json"
AUTO = "auto"
_LIBRARIES = ("torch", "diffusers", "numpy")


def this_process(device: str) -> Ask:
    """Return what tells of this process; `device` is model.device."""
    return lambda: hardware_of(choose_device(device))


def settle_dtype(asked: str, begun: Callable[[], str | None], ask: Ask) -> str:
    """Return the dtype to compute in: the one asked for; for auto that of the run as it began, else what fits."""
    if asked != AUTO:
        return asked
    return begun() or choose_dtype(ask()).dtype


def dtype_of_run(folder: Path, storage: Storage | None) -> str | None:
    """Return the dtype that a run in this folder or storage began with; None when there is none. Raises CanvasError."""
    state = FolderStorage(folder).load() or (None if storage is None else storage.load())
    return None if state is None else str(state.keys["model.dtype"])


def explain_dtype(asked: str, used: str, hardware: Hardware) -> str:
    """Say why a dtype is used, in a few words."""
    if asked != AUTO:
        return "as configured"
    choice = choose_dtype(hardware)
    if choice.dtype != used:
        return f"auto: as the run began; here it would be {choice.dtype}, for {choice.reason}"
    return f"auto: {choice.reason}"


def remark_on_dtype(asked: str, used: str, hardware: Hardware, key: str = "model.dtype") -> str | None:
    """Return the line a user should read about a dtype, if there is any; `key` names it in the configuration."""
    choice = choose_dtype(hardware)
    if asked == AUTO and choice.dtype != used:
        return f"{key}=auto keeps {used}, with which this run began; here it would be {choice.dtype}: {choice.reason}."
    if used == "bfloat16" and hardware.device == "cpu" and hardware.bfloat16 is None:
        return f"{key}=bfloat16 is several times slower here than float32: {choice.reason}. Use auto for new runs."
    return None


def settle_run(config: RunConfig, storage: Storage | None, ask: Ask) -> RunConfig:
    """Settle model.dtype: it decides bytes, so keys and config.yaml hold what auto came to. Raises: EngineError."""
    folder = Path(config.output.folder)
    dtype = settle_dtype(config.model.dtype, lambda: dtype_of_run(folder, storage), ask)
    return replace(config, model=replace(config.model, dtype=dtype))  # type: ignore[arg-type]  # one of the key's


def facts_of(asked: str, used: str, hardware: Hardware) -> dict[str, object]:
    """Return what reports say of device and dtype."""
    return {"device": hardware.device, "dtype": used, "dtype_reason": explain_dtype(asked, used, hardware)}


def check_environment(folder: Path, facts: Mapping[str, object]) -> None:
    """Hold a run to the kind of device and the libraries it began with: they decide the last bits.

    The other facts are noted beside them; the dtype is among the run's keys. Raises: CanvasMismatchError naming what
    differs.
    """
    path = folder / ENVIRONMENT
    now = {"device": facts["device"], **{name: version(name) for name in _LIBRARIES}}
    if not path.exists():
        write_atomically(path, (json.dumps({**now, **facts}, indent=1) + "\n").encode())
        return
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CanvasError(
            f"{path} must say where this run began; {error}. Restore it, or remove it to continue on trust."
        ) from error
    differing = [f"{k} was {then.get(k)}, now {now[k]}" for k in now if then.get(k) != now[k]]
    if differing:
        raise CanvasMismatchError(
            f"{folder} was begun elsewhere: {'; '.join(differing)}; the last bits would differ. Continue it there, or "
            "use another output.folder."
        )
