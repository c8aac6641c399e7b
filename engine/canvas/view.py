"""The canvas of a run that another process may be working on: seen without its lock, changing nothing.

What was committed when the view was made is read; the worker overwrites it only after its next commit. So what was read
is whole if no commit came in between, which `moved` tells afterwards.
"""

from pathlib import Path
from typing import cast

import numpy as np

from engine.canvas.arrays import open_array
from engine.canvas.run_state import RunState
from engine.canvas.storage import FolderStorage, open_storage
from engine.core.errors import CanvasError


class CanvasView:
    """A run at one commit."""

    def __init__(self, folder: Path) -> None:
        """Raises: CanvasError if the folder, or where its latents lie, has no state.json that can be read."""
        self.folder = folder
        home = FolderStorage(folder)
        store = _present(home.load(), home.where).store
        self._storage = home if store is None else open_storage(store)
        self.state = self._load()

    def _load(self) -> RunState:
        return _present(self._storage.load(), self._storage.where)

    def moved(self) -> bool:
        """Say whether a commit came since. Raises CanvasError."""
        return self._load().commits != self.state.commits

    def read(self, level: str, y0: int, y1: int, x0: int = 0, x1: int | None = None) -> np.ndarray:
        """Return a window of a level, float32 (3, y1-y0, x1-x0) in latent px; ask `moved` afterwards.

        Raises: CanvasError if nothing is committed yet or the rows cannot be read, as when they are being overwritten.
        """
        buffer = self.state.buffers[level]
        if buffer is None:
            raise CanvasError(
                f"{self.folder} must have committed latents of level {level}; it has none yet. Wait for the first "
                "step of the run."
            )
        height, width = cast("tuple[int, int]", self.state.keys[f"plan.levels.{level}"])  # Canvas.open puts it there
        try:
            array = open_array(self._storage.arrays, self._place, level, buffer, (height, width), mode="r")
            rows = np.asarray(array[:, y0:y1, x0:x1])
        except self._storage.unreachable as error:
            raise self._storage.failed(error, f"rows {y0}..{y1} of level {level} cannot be read") from error
        except (ValueError, RuntimeError, OSError) as error:  # what zarr raises on a truncated or changed chunk
            raise self._damaged(level, y0, y1, str(error)) from error
        if np.isnan(rows).any():
            raise self._damaged(level, y0, y1, "a chunk is missing")
        return rows

    def _damaged(self, level: str, y0: int, y1: int, why: str) -> CanvasError:
        return CanvasError(
            f"{self._place}: rows {y0}..{y1} of level {level} must be whole; {why}. Continue the run, "
            "which names the damaged chunk, or restore it from a backup."
        )

    @property
    def _place(self) -> str:
        return f"{self._storage.where}/canvas.zarr"


def _present(state: RunState | None, where: str) -> RunState:
    if state is None:
        raise CanvasError(f"{where} must hold a run (state.json); it does not. Name the folder of a run.")
    return state
