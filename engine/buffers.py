"""One buffer of the canvas on disk: opened, held to its shape, and marked with the commit it holds.

The mark lies in the buffer itself, as an attribute of its array, so that a state.json older than its latents shows: the
buffer it names was written again since. While a step is written into a buffer it has no mark. It knows no steps.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
import zarr.errors
from zarr.storage import LocalStore

from engine.errors import CanvasError
from engine.magnification import LATENT_CHANNELS
from engine.state import RunState

BAND = 256
"""Rows and columns of a chunk in latent px: the unit of writing."""
MARK = "commit"
"""Attribute of an array: the number of the commit it holds."""
Size = tuple[int, int]


def open_array(folder: Path, name: str, buffer: int, size: Size, mode: Literal["r", "r+"] = "r+") -> Any:
    """Open one buffer of a level of a run; `size` is (h, w) in latent px. Raises CanvasError unless it is as made."""
    path = f"{name}/latent_{buffer}"
    try:
        array = zarr.open_array(LocalStore(folder / "canvas.zarr"), path=path, mode=mode)
    except (OSError, ValueError, KeyError, TypeError, zarr.errors.BaseZarrError) as error:
        raise CanvasError(
            f"{folder / 'canvas.zarr'}: array {path} must be there; it cannot be opened ({error}). Restore "
            f"{path}/zarr.json from a backup, or remove {folder} and run again."
        ) from error
    wanted = ((LATENT_CHANNELS, *size), (LATENT_CHANNELS, BAND, BAND), np.dtype("float32"))
    if (array.shape, array.chunks, array.dtype) != wanted or not np.isnan(array.fill_value):
        raise CanvasError(
            f"{folder / 'canvas.zarr'}: array {path} must be {wanted}; got {array.dtype} {array.shape} in "
            f"chunks {array.chunks}. Restore {path}/zarr.json from a backup, or remove {folder} and run again."
        )
    return array


def mark(array: Any, commit: int | None) -> None:
    """Note that a buffer holds this commit; None: nothing whole. Raises OSError; durable when its files are."""
    array.attrs[MARK] = commit


def check_marks(arrays: Mapping[tuple[str, int], Any], state: RunState, path: Path) -> None:
    """Refuse a state whose committed buffers were written again after it; `path` is its state.json.

    Raises: CanvasError.
    """
    for level, buffer in state.buffers.items():
        if buffer is None:
            continue
        found = arrays[level, buffer].attrs.get(MARK, 0)  # none in runs begun before there were marks
        if found is None or found > state.commits:
            now = "is being written again" if found is None else f"holds commit {found}"
            raise CanvasError(
                f"{path} must be the newest there was; it is of commit {state.commits}, but {level}/latent_{buffer}, "
                f"which it names, {now}. Put the newer state.json back, or remove {path.parent} and run again."
            )
