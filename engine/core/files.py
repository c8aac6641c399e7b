"""Files that survive a power cut, the lock of a run folder, and keys that must stay as they were.

A file written here is either the old one or the whole new one. It knows nothing of arrays, levels, pixels or buckets.
Pattern: write a temporary file, fsync it, rename it over the old one, fsync the folder.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from engine.core.errors import CanvasError, CanvasMismatchError

LOCK = "run.lock"
"""In a folder that belongs to one process at a time."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by new content, durably. Raises CanvasError; the old file then still stands."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, content: object) -> None:
    """Replace a file by readable JSON, durably. Raises CanvasError; the old file then still stands."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


@contextlib.contextmanager
def replacing(path: Path, needed: int | None = None) -> Generator[Path]:
    """Give a temporary path to write to; afterwards it durably replaces `path`, whole or not at all.

    `needed` (bytes) is for the message. Raises: CanvasError if the disk refuses; the old file then still stands.
    """
    with _partial_of(path, needed) as partial:
        yield partial
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)


@contextlib.contextmanager
def _partial_of(path: Path, needed: int | None) -> Generator[Path]:
    """Give the temporary name of `path`; nothing is left there, whatever happens. Raises: CanvasError for OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        try:
            yield partial
        finally:
            _drop(partial)  # before the message, which says how much room there is
    except OSError as error:
        raise disk_error(error, f"{path} cannot be written", path.parent, needed) from error


@contextlib.contextmanager
def replacing_folder(path: Path, markers: tuple[str, ...], needed: int | None = None) -> Generator[Path]:
    """Give an empty temporary folder to fill; afterwards it durably replaces the folder `path`, whole or not at all.

    A folder that is there is replaced only when it is empty or holds one of `markers`, files that every folder of this
    kind has: a mistyped path must not cost a user's files. `needed` (bytes) is for the message.
    Raises: CanvasError if it is another folder or the disk refuses; the old folder then still stands.
    """
    old = path.with_name(path.name + ".old.partial")
    with _partial_of(path, needed) as partial:
        if path.exists() and not any((path / marker).is_file() for marker in markers) and not _is_empty(path):
            raise CanvasError(
                f"{path} must be free, or an earlier export with {' or '.join(markers)}; it is something else. Choose "
                "another name, or remove it yourself."
            )
        remove(partial)
        partial.mkdir()
        yield partial
        fsync_tree(partial)
        remove(old)
        if path.exists():
            path.rename(old)  # a folder cannot be renamed over a full one
        try:
            partial.rename(path)
        except OSError:
            old.rename(path)
            raise
        fsync(path.parent)
        remove(old)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds, if it is there. Raises OSError."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path)


def _drop(path: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to show
        remove(path)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(path: Path) -> None:
    """Fsync all files below a folder, then the folders that name them. Raises OSError."""
    for entry in sorted(path.rglob("*"), key=lambda p: p.is_dir()):
        fsync(entry)
    fsync(path)


def disk_error(error: OSError, what: str, folder: Path | None = None, needed: int | None = None) -> CanvasError:
    """Say what a failed disk operation means to the run and what to do.

    `folder` is where the free space is looked up, `needed` is in bytes.
    """
    if error.errno in _FULL:
        space = f", about {needed / 2**20:,.0f} MiB are needed" if needed is not None else ""
        if folder is not None:
            with contextlib.suppress(OSError):
                space += f", {shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free"
        return CanvasError(
            f"{what}: the disk, quota or file size limit is full{space} ({error.strerror}). Nothing "
            "committed is lost: free some space and repeat the same command to continue."
        )
    if error.errno in _READ_ONLY:
        return CanvasError(f"{what}: no permission to write ({error.strerror}). Allow it, or choose another folder.")
    return CanvasError(f"{what}: {error.strerror or error}. Check the disk, then repeat the command to continue.")


def lock_owner(path: Path) -> tuple[int, str] | None:
    """Return (process, host) of whoever holds or held a LOCK; None when it does not say so. Raises OSError."""
    words = path.read_text(encoding="utf-8", errors="replace").split()
    return (int(words[1]), words[3]) if len(words) == 4 and words[1].isdecimal() else None


class RunLock:
    """Hold a folder. The lock dies with its process, so a leftover file does not block."""

    def __init__(self, folder: Path, key: str = "output.folder") -> None:
        """Take LOCK in the folder at once, which is made if need be. `key` names it in the configuration.

        Raises: CanvasError if another process holds it, or the disk refuses.
        """
        path = folder / LOCK
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


def plain(keys: dict[str, object]) -> dict[str, object]:
    """Return the keys as JSON gives them back (tuples become lists), so that old and new compare equal.

    Raises: ValueError for NaN, TypeError for what JSON does not know.
    """
    return json.loads(json.dumps(keys, allow_nan=False))


def differences(old: dict[str, object], new: dict[str, object]) -> str:
    """Return "key was X, now Y" of every key that differs, one after the other; nothing if none does."""

    def show(keys: dict[str, object], key: str) -> str:
        return repr(keys[key])[:120] if key in keys else "absent"

    differing = sorted(k for k in old.keys() | new.keys() if (k in old, old.get(k)) != (k in new, new.get(k)))
    return "; ".join(f"{k} was {show(old, k)}, now {show(new, k)}" for k in differing)


def check_keys(where: Path | str, old: dict[str, object], new: dict[str, object]) -> None:
    """Refuse to continue a run with other keys. Raises CanvasMismatchError naming each, old and new."""
    if lines := differences(old, new):
        raise CanvasMismatchError(
            f"{where} holds a run of another plan: {lines}. Use the old values to continue it, or another "
            "output folder."
        )
