"""Where the latents of a run and its state lie: the contract `Storage`, and a folder as one.

What state.json names is whole in every storage, whatever interrupts; how that is done is the storage's own matter. It
does not know what latents mean or which rows are written when.
Facts: zarr 3 renames each chunk into place without fsync.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from zarr.abc.store import Store
from zarr.storage import LocalStore

from engine.canvas.arrays import Size, canvas_nbytes, create_arrays
from engine.canvas.run_state import Progress, RunState, check_run_keys, load_state, save_state
from engine.core.errors import CanvasError, EngineError
from engine.core.files import LOCK, RunLock, disk_error, fsync, fsync_tree, remove, write_atomically

_OURS = frozenset({LOCK, "canvas.zarr", "config.yaml", "state.json.partial"})
"""What a run that died before its first state.json may have left."""
RECORDS, PREVIEWS = "records", "live"
"""Folders in a run's folder: what is kept as it was first written, and the previews of a run at work."""
GIVEN = "given-"
"""Begins the names of pictures that were given as arrays; they are kept in the run's folder before the run begins."""


class Storage(Protocol):
    """The place of one run. All raise CanvasError, in words for the user, when the place is not as it must be."""

    @property
    def where(self) -> str:
        """The folder or URL, for messages."""
        ...

    @property
    def url(self) -> str:
        """What `open_storage` takes."""
        ...

    @property
    def arrays(self) -> Store:
        """canvas.zarr."""
        ...

    @property
    def unreachable(self) -> tuple[type[Exception], ...]:
        """What `arrays` raises, beside OSError, when it does not answer; `failed` puts it into words."""
        ...

    def check(self) -> None:
        """Refuse a place that is neither empty nor a run's, touching nothing."""
        ...

    def lock(self) -> None:
        """Keep other runs out, or be refused."""
        ...

    def unlock(self) -> None:
        """Let another run in; harmless when repeated."""
        ...

    def hold(self) -> None:
        """Raise if the lock was lost to another run."""
        ...

    def load(self) -> RunState | None:
        """Return the state; None before the first."""
        ...

    def begin(self, keys: dict[str, object], levels: dict[str, Size]) -> RunState:
        """Create the run, or continue it; needs the lock. The buffers 2w and 2w+1 of its writer w are there then."""
        ...

    def settle(self, array: str, row: int, columns: int) -> None:
        """Bring a row of an array's chunks to the disk already, so that `sync` has less to do; promises nothing."""
        ...

    def sync(self, arrays: Iterable[str]) -> None:
        """Make what was written to these arrays survive a power cut."""
        ...

    def save(self, state: RunState) -> None:
        """Replace the state, durably and whole."""
        ...

    def record(self, name: str) -> bytes | None:
        """Return a file that a resume must not compute anew, if it is kept here."""
        ...

    def keep(self, name: str, data: bytes) -> None:
        """Keep such a file; the first of a name stands."""
        ...

    def failed(self, error: Exception, what: str, needed: int | None = None) -> CanvasError:
        """Say what an error of `arrays` means and what to do; `needed` is in bytes."""
        ...


def open_storage(url: str) -> Storage:
    """Return the storage behind a canvas.store URL; nothing is asked of it yet. Raises EngineError."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return FolderStorage(Path(unquote(parts.path)), "canvas.store")
    try:
        from engine.canvas.object_storage import ObjectStorage  # an extra: most runs need no cloud library
    except ModuleNotFoundError as error:
        raise EngineError(
            f"canvas.store={url} needs the package obstore; {error}. Install it with pip install -c constraints.txt -e "
            "'.[cloud]', or use a folder (file:///…)."
        ) from error
    return ObjectStorage.connect(url)


class FolderStorage:
    """A folder, on a disk of this machine or on a shared file system."""

    unreachable: tuple[type[Exception], ...] = ()

    def __init__(self, folder: Path, key: str = "output.folder") -> None:
        """`key` names the folder's place in the configuration, for messages."""
        self._folder = folder
        self._key = key
        self._lock: RunLock | None = None

    @property
    def where(self) -> str:
        return str(self._folder)

    @property
    def url(self) -> str:
        return self._folder.resolve().as_uri()

    @property
    def arrays(self) -> Store:
        return LocalStore(self._folder / "canvas.zarr")

    def check(self) -> None:
        folder = self._folder
        try:
            if (folder / "state.json").exists():
                load_state(folder / "state.json")
                return
            there = (p.name for p in folder.iterdir()) if folder.exists() else ()
            foreign = sorted(name for name in there if name not in _OURS and not name.startswith(GIVEN))
        except OSError as error:
            raise disk_error(error, f"{folder} cannot be used as {self._key}") from error
        if foreign or ((folder / "canvas.zarr").exists() and not (folder / LOCK).exists()):
            raise CanvasError(
                f"{folder} must be empty or hold a run (state.json); it holds "
                f"{', '.join(foreign[:3]) or 'a foreign canvas.zarr'}. Use another {self._key}."
            )
        chunk = next((p for p in (folder / "canvas.zarr").rglob("c/*/*/*") if p.is_file()), None)
        if chunk is not None:
            raise CanvasError(
                f"{folder} must have a state.json, which says how far {chunk.relative_to(folder)} and the others are. "
                "Restore it, or remove the folder and run again."
            )

    def lock(self) -> None:
        self._lock = RunLock(self._folder, self._key)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def hold(self) -> None:
        """A kernel does not take a lock away."""

    def load(self) -> RunState | None:
        path = self._folder / "state.json"
        return load_state(path) if path.exists() else None

    def begin(self, keys: dict[str, object], levels: dict[str, Size]) -> RunState:
        try:
            state = self.load()
            if state is None:
                return self._create(keys, levels)
            check_run_keys(self._folder, state.keys, keys)
            self.sweep()
        except OSError as error:
            raise self.failed(error, f"{self._folder} cannot be used", canvas_nbytes(levels)) from error
        return state

    def sweep(self) -> None:
        """Remove what writers killed in the middle left behind; a chunk counts from its rename on."""
        stores = [partial for store in self._folder.glob("*.zarr") for partial in store.rglob("*.partial")]
        folders = (self._folder, self._folder / RECORDS, self._folder / PREVIEWS)
        for partial in [*stores, *(partial for folder in folders for partial in folder.glob("*.partial"))]:
            remove(partial)

    def _create(self, keys: dict[str, object], levels: dict[str, Size]) -> RunState:
        """Make all arrays before anyone writes, then state.json, which makes the folder a run."""
        self.check()  # again: only under the lock can no other run change it
        needed, free = canvas_nbytes(levels), shutil.disk_usage(self._folder).free
        if free < needed:
            raise CanvasError(
                f"{self._folder} must have room for the latents, {needed / 2**20:,.0f} MiB; {free / 2**20:,.0f} MiB "
                f"are free. Free some space, choose another {self._key} or a smaller canvas."
            )
        create_arrays(self.arrays, levels, (0, 1), "w")
        fsync_tree(self._folder / "canvas.zarr")
        state = RunState(keys, Progress(), dict.fromkeys(levels))
        self.save(state)
        fsync(self._folder.parent)
        return state

    def settle(self, array: str, row: int, columns: int) -> None:
        for column in range(columns):
            fsync(self._folder / "canvas.zarr" / array / "c" / "0" / str(row) / str(column))

    def sync(self, arrays: Iterable[str]) -> None:
        try:
            for path in arrays:
                fsync_tree(self._folder / "canvas.zarr" / path)
        except OSError as error:
            raise self.failed(error, f"{self._folder / 'canvas.zarr'} cannot be written") from error

    def save(self, state: RunState) -> None:
        save_state(self._folder / "state.json", state)

    def record(self, name: str) -> bytes | None:
        path = self._folder / RECORDS / name
        try:
            return path.read_bytes() if path.exists() else None
        except OSError as error:
            raise disk_error(error, f"{path} cannot be read") from error

    def keep(self, name: str, data: bytes) -> None:
        path = self._folder / RECORDS / name
        if not path.exists():
            try:
                path.parent.mkdir(exist_ok=True)
            except OSError as error:
                raise disk_error(error, f"{path} cannot be written") from error
            write_atomically(path, data)

    def failed(self, error: Exception, what: str, needed: int | None = None) -> CanvasError:
        assert isinstance(error, OSError)  # nothing else is unreachable here
        return disk_error(error, what, self._folder, needed)
