"""A finished run, seen by who builds on it: its latents, its picture, what it was made with. Nothing in it changes.

A redo is one too: its window's latents lie over those of its parent, to any depth. It knows no networks.
"""

import json
from pathlib import Path

import numpy as np

from engine.canvas.view import CanvasView
from engine.conditions.conditions import STORED, stored_grid
from engine.core.errors import CanvasError, CanvasMismatchError, EngineError
from engine.core.streaming import Box
from engine.generation.inpaint_region import laid_over, window_under
from engine.generation.preview import find_picture
from engine.images.ome_zarr import Image
from engine.sampling.plan import Plan

RECORD = "redo.json"
"""Says where the run lies that a redo was made of."""


class FinishedRun:
    """A finished run, or a finished redo of one."""

    def __init__(self, folder: Path) -> None:
        """Raises: EngineError unless a finished run lies there; CanvasError if files are damaged, a parent's too."""
        if not (folder / "state.json").is_file():
            raise EngineError(f"{folder} must be the folder of a run, with state.json; it is not. Pass output.folder.")
        self.folder = folder
        self._view = CanvasView(folder)
        now = self._view.state.progress
        if not now.finished:
            raise EngineError(
                f"{folder} must be a finished run; it is after step {now.steps} of pass {now.pass_index + 1}, or lacks "
                "exports. Run its command again to complete it."
            )
        self.parent = self._find_parent()

    @property
    def digest(self) -> str:
        """The sha256 of everything that decided the picture's bytes."""
        return self._view.state.digest

    @property
    def keys(self) -> dict[str, object]:
        """The keys behind the digest."""
        return self._view.state.keys

    @property
    def root(self) -> "FinishedRun":
        """The run at the bottom, which is no redo."""
        return self if self.parent is None else self.parent.root

    @property
    def grid(self) -> np.ndarray:
        """The SSL vectors under the canvas, float32 (D, h, w). Raises CanvasError."""
        return stored_grid(self.root.folder / STORED)

    def picture(self) -> Image:
        """Return the decoded picture. Raises CanvasError."""
        image = find_picture(self.folder)
        if image is None:
            raise CanvasError(f"{self.folder} must hold its decoded picture; it is gone. Run its command again.")
        return image

    def latents(self, plan: Plan, level: str, box: Box) -> np.ndarray:
        """Return a box of the latents of a level, float32 (3, h, w). Raises CanvasError."""
        if self.parent is None:
            return self._view.read(level, box.y0, box.y1, box.x0, box.x1)
        old = self.parent.latents(plan, level, box)
        if level != plan.finest.name:
            return old
        x, y, width, height = (int(part) for part in self.keys["redo.region"])  # type: ignore[union-attr]
        _, window = window_under(plan, Box(y, x, y + height, x + width))
        return laid_over(old, box, window, lambda *part: self._view.read(level, *part))

    def _find_parent(self) -> "FinishedRun | None":
        if "redo.parent" not in self.keys:
            return None
        try:
            name = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))["run"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CanvasError(
                f"{self.folder / RECORD} must say where the run lies that this is a redo of; {error}. Restore it."
            ) from error
        parent = FinishedRun(self.folder / name)
        if parent.digest != self.keys["redo.parent"]:
            raise CanvasMismatchError(
                f"{self.folder} is a redo of the run {self.keys['redo.parent']}; {parent.folder} holds "
                f"{parent.digest}. Put the run back, or correct {self.folder / RECORD}."
            )
        return parent
