"""The canvas of a run that another process may be working on: seen without its lock, changing nothing.

What was committed when the view was made is read; the worker overwrites it only after its next commit. So what was read
is whole if no commit came in between, which `moved` tells afterwards.
"""

from pathlib import Path

import numpy as np

from engine.canvas import open_array
from engine.errors import CanvasError
from engine.state import load_state


class CanvasView:
    """A run at one commit."""

    def __init__(self, folder: Path) -> None:
        """Raises: CanvasError if the folder has no state.json that can be read."""
        self.folder = folder
        self.state = load_state(folder / "state.json")

    def moved(self) -> bool:
        """Say whether a commit came since. Raises CanvasError."""
        return load_state(self.folder / "state.json").commits != self.state.commits

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
        height, width = self.state.keys[f"plan.levels.{level}"]  # type: ignore[misc]  # Canvas.open puts it there
        array = open_array(self.folder, level, buffer, (height, width), mode="r")
        try:
            rows = np.asarray(array[:, y0:y1, x0:x1])
        except (ValueError, RuntimeError, OSError) as error:  # what zarr raises on a truncated or changed chunk
            raise self._damaged(level, y0, y1, str(error)) from error
        if np.isnan(rows).any():
            raise self._damaged(level, y0, y1, "a chunk is missing")
        return rows

    def _damaged(self, level: str, y0: int, y1: int, why: str) -> CanvasError:
        return CanvasError(
            f"{self.folder / 'canvas.zarr'}: rows {y0}..{y1} of level {level} must be whole; {why}. Continue the run, "
            "which names the damaged chunk, or restore it from a backup."
        )
