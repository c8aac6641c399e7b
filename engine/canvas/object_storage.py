"""A prefix of a bucket as the storage of a run, with conditional writes in place of locks and renames.

Each opening of the run is a writer with a number and arrays of its own, and the state is written on the condition that
no other writer did. So a run that lost its lease without noticing spoils nothing that a state names.
What it does not know: rows, steps and pictures.
"""

from collections.abc import Iterable
from dataclasses import replace

from obstore.store import ObjectStore
from zarr.abc.store import Store
from zarr.storage import ObjectStore as ZarrStore

from engine.canvas.arrays import Size, array_path, create_arrays
from engine.canvas.lease import Lease
from engine.canvas.object_client import UNREACHABLE, Objects, OvertakenError, Version, connect, failed
from engine.canvas.run_state import Progress, RunState, check_run_keys, decode_state, encode_state
from engine.core.errors import CanvasError
from engine.core.files import LOCK

_STATE = "state.json"


class ObjectStorage:
    """Objects below a URL: state.json, run.lock, records/ and canvas.zarr/."""

    unreachable = UNREACHABLE

    def __init__(self, where: str, store: ObjectStore, chunks: ObjectStore) -> None:
        """`store` begins at the run's prefix, `chunks` at its canvas.zarr."""
        self._objects = Objects(where, store)
        self._chunks = Objects(f"{where}/canvas.zarr", chunks)
        self._lease = Lease(self._objects)
        self._version: Version | None = None
        """Of the state.json that this writer wrote last."""
        self._inherited: dict[str, int] = {}
        """Level → the array of an earlier writer that the state still names."""

    @classmethod
    def connect(cls, url: str) -> "ObjectStorage":
        """Use a URL; nothing is asked yet. Raises CanvasError if it is none of an object store."""
        where = url.rstrip("/")
        return cls(where, connect(where), connect(f"{where}/canvas.zarr"))

    @property
    def where(self) -> str:
        return self._objects.where

    @property
    def url(self) -> str:
        return self._objects.where

    @property
    def arrays(self) -> Store:
        return ZarrStore(self._chunks.store)

    def check(self) -> None:
        if self.load() is None:
            foreign = [name for name in self._objects.children() if name != LOCK]
            if foreign:
                raise CanvasError(
                    f"{self.where} must be empty or hold a run ({_STATE}); it holds {', '.join(foreign[:3])}. Restore "
                    f"{_STATE} if this was a run, or use another canvas.store."
                )

    def lock(self) -> None:
        self._lease.acquire()

    def unlock(self) -> None:
        self._lease.release()

    def hold(self) -> None:
        self._lease.hold()

    def load(self) -> RunState | None:
        found = self._objects.get(_STATE)
        return None if found is None else decode_state(found[0], f"{self.where}/{_STATE}")

    def begin(self, keys: dict[str, object], levels: dict[str, Size]) -> RunState:
        found = self._objects.get(_STATE)
        if found is None:
            self.check()  # again: only under the lease can no other run change it
            state = RunState(keys, Progress(), dict.fromkeys(levels), writer=1)
        else:
            old, self._version = decode_state(found[0], f"{self.where}/{_STATE}"), found[1]
            check_run_keys(self.where, old.keys, keys)
            state = replace(old, writer=old.writer + 1)
        self.save(state)  # from here on no other writer can commit
        try:
            create_arrays(self.arrays, levels, (2 * state.writer, 2 * state.writer + 1), "a")
        except (*UNREACHABLE, OSError) as error:
            raise self.failed(error, "the arrays cannot be made") from error
        self._inherited = {level: buffer for level, buffer in state.buffers.items() if buffer is not None}
        self._sweep(state)
        return state

    def settle(self, array: str, row: int, columns: int) -> None:
        """Do nothing, as `sync`."""

    def sync(self, arrays: Iterable[str]) -> None:
        """Do nothing: an object that was accepted is durable."""

    def save(self, state: RunState) -> None:
        self.hold()
        try:
            self._version = self._objects.put(_STATE, encode_state(state), self._version)
        except OvertakenError as error:
            raise CanvasError(
                f"{self.where}/{_STATE} must be written by one run at a time; another one wrote it since. What it "
                "committed stands. Stop the other run before you continue this one."
            ) from error
        for level, buffer in list(self._inherited.items()):
            if state.buffers[level] != buffer:
                self._chunks.remove(array_path(level, self._inherited.pop(level)))

    def record(self, name: str) -> bytes | None:
        found = self._objects.get(f"records/{name}")
        return None if found is None else found[0]

    def keep(self, name: str, data: bytes) -> None:
        if name not in self._objects.children("records"):
            self._objects.put(f"records/{name}", data, None)

    def failed(self, error: Exception, what: str, needed: int | None = None) -> CanvasError:
        return failed(self.where, error, what)

    def _sweep(self, state: RunState) -> None:
        """Remove arrays of earlier writers that the state does not name; `save` clears away what it drops itself."""
        for level, buffer in state.buffers.items():
            own = (buffer, 2 * state.writer, 2 * state.writer + 1)
            named = {array_path(level, b).rpartition("/")[2] for b in own if b is not None}
            for name in self._chunks.children(level):
                if name.startswith("latent_") and name not in named:
                    self._chunks.remove(f"{level}/{name}")
