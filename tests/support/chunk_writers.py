"""Who wrote every chunk of a canvas, and an error when a second one does within a step: proof that runs keep apart.

A chunk of a step is claimed by creating a file, which only one process of all that share the folder can do. It stands
beside the lock and does not trust it: some shared file systems have locks that do not lock.
"""

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from engine.canvas.canvas import BAND, Canvas
from engine.core.errors import CanvasError
from engine.core.files import disk_error

FOLDER = "writers"


class ChunkWriters:
    """The claims of the step at work and of the step before it, `writers/<commit>/<chunk>` in the run folder."""

    def __init__(self, folder: Path, commits: int) -> None:
        """`commits` were made; what a dead process claimed for the next one is dropped. Call under the lock."""
        self._folder = folder / FOLDER
        shutil.rmtree(self._folder / str(commits + 1), ignore_errors=True)

    def claim(self, commit: int, array: str, row: int, columns: int) -> None:
        """Note this process as the writer of a row of an array's chunks, which count from `commit` on.

        Raises: CanvasError naming both writers if a chunk has one already, or if the disk refuses.
        """
        folder = self._folder / str(commit)
        me = f"process {os.getpid()} on {socket.gethostname()}, {threading.current_thread().name}"
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self._folder / str(commit - 2), ignore_errors=True)
            for column in range(columns):
                path = folder / f"{array.replace('/', '.')}.c.0.{row}.{column}"
                try:
                    with path.open("x") as file:
                        file.write(me + "\n")
                except FileExistsError as error:
                    first = path.read_text().strip() or "a writer that has not said who it is"
                    raise CanvasError(
                        f"{path} must have one writer per step; {first} has written it, and now {me} does. Stop the "
                        "other run on this folder; if there is none, this is a bug to report."
                    ) from error
        except OSError as error:
            raise disk_error(error, f"{folder} cannot be written") from error


def record_writers(replace: Callable[[type, str, object], None] = setattr) -> None:
    """From now on every canvas of this process claims the chunks that it writes; `replace` may be a monkeypatch's."""
    write, claims = Canvas.write, WeakKeyDictionary[Canvas, ChunkWriters]()

    def noted(canvas: Canvas, level: str, y0: int, rows: np.ndarray) -> None:
        commits, array = canvas._state.commits, canvas._arrays[level, canvas._other(level)]
        if canvas not in claims:
            claims[canvas] = ChunkWriters(canvas.folder, commits)
        claims[canvas].claim(commits + 1, array.path, y0 // BAND, -(-rows.shape[2] // BAND))
        write(canvas, level, y0, rows)

    replace(Canvas, "write", noted)
