"""environment.json: on which device and libraries a run began, and whether that still holds; they decide the last bits.

Invariant: from the first start on, the run's folder says what it was. It does not know what is computed.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from engine.canvas.storage import FolderStorage, Storage
from engine.core.errors import CanvasError, CanvasMismatchError
from engine.core.files import write_json

ENVIRONMENT = "environment.json"
_LIBRARIES = ("torch", "diffusers", "numpy")


def dtype_of_run(folder: Path, storage: Storage | None) -> str | None:
    """Return the dtype that a run in this folder or storage began with; None when there is none. Raises CanvasError."""
    state = FolderStorage(folder).load() or (None if storage is None else storage.load())
    return None if state is None else str(state.keys["model.dtype"])


def check_environment(folder: Path, facts: Mapping[str, object]) -> None:
    """Hold a run to the kind of device and the libraries it began with: they decide the last bits.

    The other facts are noted beside them; the dtype is among the run's keys. Raises: CanvasMismatchError naming what
    differs.
    """
    path = folder / ENVIRONMENT
    now = {"device": facts["device"], **{name: version(name) for name in _LIBRARIES}}
    if not path.exists():
        write_json(path, {**now, **facts})
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
