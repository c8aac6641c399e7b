"""One process per folder, by a lock of the kernel. It knows no runs."""

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from engine.errors import CanvasError
from engine.state import disk_error


class RunLock:
    """Hold a folder. The lock dies with its process, so a leftover file does not block."""

    def __init__(self, folder: Path, key: str = "output.folder") -> None:
        """Take `run.lock` in the folder at once, which is made if need be. `key` names it in the configuration.

        Raises: CanvasError if another process holds it, or the disk refuses.
        """
        path = folder / "run.lock"
        self._file: IO[str] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, f"{folder} cannot be used as {key}") from error
        try:
            file = path.open("a+")
        except OSError as error:
            raise disk_error(error, f"{path} cannot be written") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise CanvasError(
                f"{folder} must belong to one run at a time; it is in use by {owner}. Wait for that "
                f"run, stop it, or use another {key}."
            ) from error
        except OSError as error:
            file.close()
            raise disk_error(error, f"{path} cannot be locked") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let another run in; harmless when repeated."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
