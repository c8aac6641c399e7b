"""What a run knows about itself on disk: state.json, and writes that survive a power cut.

A file written here is either the old one or the whole new one. It knows nothing of arrays, levels, pixels or buckets.
Pattern: write a temporary file, fsync it, rename it over the old one, fsync the folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from engine.errors import CanvasError, CanvasMismatchError

STATE_VERSION = 1
"""Raise it when what lies in a run folder changes its meaning."""
SINCE: dict[str, object] = {
    "sampling.from_guide": 0,
    "sampling.solver": "ddim",
    "sampling.weight_from": 1000,
    "sampling.weight_to": 1,
    "guidance.cell": 1,
}
"""Keys that runs of earlier releases lack, and what those did."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Progress:
    """How far a run is; everything it names is on disk."""

    pass_index: int = 0
    """Which pass of the plan."""
    steps: int = 0
    """Steps of that pass that are committed."""
    decoded_px: int = 0
    """Image rows of the finest level that are decoded and written."""
    finished: bool = False
    """All exports are done."""


@dataclass(frozen=True)
class RunState:
    """The content of state.json."""

    keys: dict[str, object]
    """Everything that decides the bytes of the picture, flat."""
    progress: Progress
    buffers: dict[str, int | None]
    """Level → which of its two arrays is committed; None = neither yet."""
    commits: int = 0
    writer: int = 0
    """Which opening of the run wrote this; counted in object storage only."""
    store: str | None = None
    """Where the latents and their own state lie, when that is not the folder of this file."""

    @property
    def digest(self) -> str:
        """Return the sha256 of the keys: equal digests make equal pictures."""
        return _sha256(self.keys)


def plain(keys: dict[str, object]) -> dict[str, object]:
    """Return the keys as JSON gives them back (tuples become lists), so that old and new compare equal.

    Raises: ValueError for NaN, TypeError for what JSON does not know.
    """
    return json.loads(json.dumps(keys, allow_nan=False))


def _sha256(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_state(path: Path) -> RunState:
    """Read state.json. Raises CanvasError when it is garbled, edited or of another version of the engine."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise disk_error(error, f"{path} cannot be read") from error
    return decode_state(data, str(path))


def save_state(path: Path, state: RunState) -> None:
    """Replace state.json. When this returns, the new state survives a power cut. Raises CanvasError."""
    write_atomically(path, encode_state(state))


def decode_state(data: bytes, name: str) -> RunState:
    """Read the content of a state.json, `name` in messages. Raises CanvasError as `load_state` does."""
    try:
        record = json.loads(data)
        version = record["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _garbled(name, f"it is not the JSON object this engine writes ({error})") from error
    if version != STATE_VERSION:
        raise CanvasError(
            f"{name} must be of version {STATE_VERSION}; got {version!r}, written by another release of the "
            "engine. Continue with that release, or use another output.folder."
        )
    if record.pop("checksum", None) != _sha256(record):
        raise _garbled(name, "its checksum does not match its content")
    progress = Progress(**{f.name: record[f.name] for f in fields(Progress)})
    where = {name: record[name] for name in ("writer", "store") if name in record}
    return RunState(record["keys"], progress, record["buffers"], record["commits"], **where)


def encode_state(state: RunState) -> bytes:
    """Return the content of state.json."""
    record: dict[str, object] = {
        "version": STATE_VERSION,
        "digest": state.digest,
        **asdict(state.progress),
        "commits": state.commits,
        "buffers": state.buffers,
        "keys": state.keys,
    }
    record |= {"writer": state.writer} if state.writer else {}
    record |= {"store": state.store} if state.store else {}
    record["checksum"] = _sha256(record)
    return (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()


def _garbled(name: str, why: str) -> CanvasError:
    return CanvasError(
        f"{name} must say which step is committed; {why}. Restore it from a backup; without it the latents "
        f"cannot be used: remove {name.removesuffix('/state.json')} or use another output.folder to start again."
    )


def check_keys(where: Path | str, old: dict[str, object], new: dict[str, object]) -> None:
    """Refuse to continue a run with other keys. Raises CanvasMismatchError naming each, old and new."""

    old = {key: value for key, value in SINCE.items() if key in new} | old

    def show(keys: dict[str, object], key: str) -> str:
        return repr(keys[key])[:80] if key in keys else "absent"

    differing = sorted(k for k in old.keys() | new.keys() if (k in old, old.get(k)) != (k in new, new.get(k)))
    if differing:
        lines = "; ".join(f"{k} was {show(old, k)}, now {show(new, k)}" for k in differing)
        raise CanvasMismatchError(
            f"{where} holds a run of another plan: {lines}. Use the old values to continue it, or another "
            "output.folder."
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by new content, durably. Raises CanvasError; the old file then still stands."""
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Give a temporary path to write to; afterwards it durably replaces `path`, whole or not at all.

    `needed` (bytes) is for the message. Raises: CanvasError if the disk refuses; the old file then still stands.
    """
    with _partial_of(path, needed) as partial:
        yield partial
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)


@contextlib.contextmanager
def _partial_of(path: Path, needed: int | None) -> Iterator[Path]:
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
def replacing_folder(path: Path, markers: tuple[str, ...], needed: int | None = None) -> Iterator[Path]:
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
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
        return CanvasError(f"{what}: no permission to write ({error.strerror}). Allow it, or change output.folder.")
    return CanvasError(f"{what}: {error.strerror or error}. Check the disk, then repeat the command to continue.")
