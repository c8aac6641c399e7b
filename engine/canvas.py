"""The zarr state of a run: two buffers per level; what state.json names is whole, whatever interrupts.

It knows rows of latents and steps, not models, tiles or pictures.
Facts: zarr 3 renames each chunk into place without fsync, and its writes are atomic per chunk only.
"""

import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from engine.buffers import BAND, check_marks, mark, open_array
from engine.errors import CanvasError
from engine.magnification import LATENT_CHANNELS
from engine.state import (
    Progress,
    RunLock,
    RunState,
    check_folder,
    check_keys,
    disk_error,
    fsync,
    fsync_tree,
    load_state,
    plain,
    remove,
    save_state,
)
from engine.writers import ChunkWriters

__all__ = ["BAND", "Canvas", "Progress", "canvas_nbytes"]

_CRC_NBYTES = 4
Size = tuple[int, int]


def canvas_nbytes(levels: dict[str, Size]) -> int:
    """Return the bytes on disk of both buffers of all levels (latent px); border chunks are stored whole."""
    chunks = sum(-(-h // BAND) * -(-w // BAND) for h, w in levels.values())
    return 2 * chunks * (LATENT_CHANNELS * BAND * BAND * 4 + _CRC_NBYTES)


class Canvas:
    """The latents of one run. Steps read the committed buffers and write the others; `commit` swaps them."""

    def __init__(
        self, folder: Path, lock: RunLock, state: RunState, levels: dict[str, Size], record_writers: bool
    ) -> None:
        """Use `Canvas.open`."""
        self.folder = folder
        self.levels = dict(levels)
        """Name → (h, w) in latent px."""
        self._lock = lock
        self._state = state
        self._arrays = {(n, i): open_array(folder, n, i, s) for n, s in levels.items() for i in (0, 1)}
        self._written: dict[str, set[int]] = {}
        self._writers = ChunkWriters(folder, state.commits) if record_writers else None
        check_marks(self._arrays, state, folder / "state.json")

    @classmethod
    def open(cls, folder: Path, keys: dict[str, object], levels: dict[str, Size], record_writers: bool = False) -> Self:
        """Create the run in this folder, or continue the one that lies there. Close it after use.

        `keys` decide the picture's bytes, flat and JSON-able; `levels` are (h, w) in latent px. `record_writers` is
        for debugging (`engine.writers`).
        Raises: CanvasMismatchError if another plan lives there, naming the keys; CanvasError if the folder is
        foreign, in use, damaged, not writable or too small.
        """
        keys = plain(keys | {f"plan.levels.{name}": size for name, size in levels.items()})
        try:
            check_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, f"{folder} cannot be used as output.folder") from error
        with ExitStack() as on_error:
            lock = RunLock(folder / "run.lock")
            on_error.callback(lock.release)
            try:
                if (folder / "state.json").exists():
                    state = load_state(folder / "state.json")
                    check_keys(folder, state.keys, keys)
                    _sweep(folder)
                else:
                    state = _create(folder, keys, levels)
                canvas = cls(folder, lock, state, levels, record_writers)
            except OSError as error:
                raise disk_error(error, f"{folder} cannot be used", folder, canvas_nbytes(levels)) from error
            on_error.pop_all()
            return canvas

    @property
    def progress(self) -> Progress:
        """What is committed."""
        return self._state.progress

    @property
    def fresh(self) -> bool:
        """Nothing is committed yet."""
        return self._state.commits == 0

    @property
    def digest(self) -> str:
        """The sha256 of the keys: names the plan in exports and reports."""
        return self._state.digest

    @property
    def keys(self) -> dict[str, object]:
        """Everything that decides the picture's bytes, flat."""
        return self._state.keys

    def read(self, level: str, y0: int, y1: int, ahead: bool = False) -> np.ndarray:
        """Return the committed rows y0..y1 of a level, float32 (3, y1-y0, w) in latent px.

        `ahead` returns what was written since the last commit instead; ask `written` first.
        Raises: CanvasError naming array and chunk if a chunk is missing or damaged; ValueError if the rows
        lie outside the level, or if they were never committed (ahead: written).
        """
        height, _ = self._size(level)
        if not 0 <= y0 < y1 <= height:
            raise ValueError(f"rows must lie in 0..{height} of level {level}; got {y0}..{y1}.")
        buffer = self._other(level) if ahead else self._state.buffers[level]
        if buffer is None or (ahead and not self.written(level, y0, y1)):
            done = "written" if ahead else "committed"
            raise ValueError(f"rows {y0}..{y1} of level {level} must be {done} before they are read.")
        array = self._arrays[level, buffer]
        try:
            rows = np.asarray(array[:, y0:y1])
        except (ValueError, RuntimeError, OSError) as error:  # what zarr raises on a truncated or changed chunk
            raise self._damaged(array, y0, y1) from error
        if np.isnan(rows).any():
            raise self._damaged(array, y0, y1)
        return rows

    def write(self, level: str, y0: int, rows: np.ndarray) -> None:
        """Write rows, float32 (3, n, w), into the level's other buffer; they count from `commit` on.

        One band at a time: y0 is a multiple of 256 and the rows are 256 or the last remainder, so that no two
        writers ever share a chunk.
        Raises: ValueError for other shapes; CanvasError if a value is not finite or the disk refuses.
        """
        height, width = self._size(level)
        wanted = (LATENT_CHANNELS, min(BAND, height - y0), width)
        if y0 % BAND or not 0 <= y0 < height or rows.shape != wanted or rows.dtype != np.float32:
            raise ValueError(
                f"a band of level {level} must start at a multiple of {BAND} below {height} and be float32 "
                f"{wanted}; got y0={y0}, {rows.dtype} {rows.shape}."
            )
        if not np.isfinite(rows).all():
            raise CanvasError(
                f"latents of level {level}, rows {y0}..{y0 + wanted[1]}, must be finite; the network "
                "returned NaN or infinity. Use model.dtype=float32 or bfloat16, or check the checkpoint."
            )
        array = self._arrays[level, self._other(level)]
        if self._writers is not None:
            self._writers.claim(self._state.commits + 1, array.path, y0 // BAND, -(-width // BAND))
        try:
            if level not in self._written:
                mark(array, None)
            array[:, y0 : y0 + wanted[1]] = rows
        except OSError as error:
            raise self._full(error, f"{array.path}, rows {y0}..{y0 + wanted[1]}, cannot be written") from error
        self._written.setdefault(level, set()).add(y0 // BAND)

    def written(self, level: str, y0: int, y1: int) -> bool:
        """Say whether all bands under rows y0..y1 were written since the last commit."""
        return self._written.get(level, set()).issuperset(range(y0 // BAND, -(-y1 // BAND)))

    def commit(self, pass_index: int, steps: int, levels: Iterable[str] | None = None) -> None:
        """Publish what was written: durable when this returns, and the state before it if it does not.

        `levels` are the ones to publish (None: all that were written); the others keep their buffer. Nothing
        decoded before is valid afterwards.
        Raises: ValueError if a level to publish is not written completely; CanvasError if the disk refuses.
        """
        chosen = tuple(self._written) if levels is None else tuple(levels)
        for level in chosen:
            bands = set(range(-(-self._size(level)[0] // BAND)))
            missing = sorted(bands - self._written.get(level, set()))
            if missing:
                raise ValueError(f"level {level} must be written whole before commit; bands {missing} are missing.")
        buffers = self._state.buffers | {level: self._other(level) for level in chosen}
        try:
            for level in chosen:
                mark(self._arrays[level, self._other(level)], self._state.commits + 1)
                fsync_tree(self.folder / "canvas.zarr" / level / f"latent_{self._other(level)}")
        except OSError as error:
            raise self._full(error, f"{self.folder / 'canvas.zarr'} cannot be written") from error
        progress = Progress(pass_index=pass_index, steps=steps)
        self._save(replace(self._state, progress=progress, buffers=buffers, commits=self._state.commits + 1))
        for level in chosen:
            del self._written[level]

    def record(self, *, decoded_px: int | None = None, finished: bool | None = None) -> None:
        """Note how far decoding and export are; the caller makes the pixels durable first (`Image.write`)."""
        now = self.progress
        decoded = now.decoded_px if decoded_px is None else decoded_px
        done = now.finished if finished is None else finished
        self._save(replace(self._state, progress=replace(now, decoded_px=decoded, finished=done)))

    def close(self) -> None:
        """Let another run use the folder; harmless when repeated."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def _size(self, level: str) -> Size:
        if level not in self.levels:
            raise ValueError(f"level must be one of {', '.join(self.levels)}; got {level!r}.")
        return self.levels[level]

    def _other(self, level: str) -> int:
        return 1 if self._state.buffers[level] == 0 else 0

    def _save(self, state: RunState) -> None:
        save_state(self.folder / "state.json", state)
        self._state = state

    def _full(self, error: OSError, what: str) -> CanvasError:
        return disk_error(error, what, self.folder, canvas_nbytes(self.levels))

    def _damaged(self, array: Any, y0: int, y1: int) -> CanvasError:
        """Find the first chunk of these rows that cannot be used; zarr's own messages name none."""
        where, why = "unknown", "cannot be read"
        for cy in range(y0 // BAND, -(-y1 // BAND)):
            for cx in range(-(-array.shape[2] // BAND)):
                try:
                    block = np.asarray(array[:, cy * BAND : (cy + 1) * BAND, cx * BAND : (cx + 1) * BAND])
                    problem = "is missing" if np.isnan(block).any() else None
                except (ValueError, RuntimeError, OSError) as error:
                    problem = f"is damaged ({str(error).splitlines()[0][:60]})"
                if problem and where == "unknown":
                    where, why = f"0/{cy}/{cx}", problem
        p = self.progress
        return CanvasError(
            f"{self.folder / 'canvas.zarr'}: chunk c/{where} of {array.path} {why}; it holds pass "
            f"{p.pass_index}, step {p.steps}. Restore the file from a backup, or remove {self.folder} and run again."
        )


def _create(folder: Path, keys: dict[str, object], levels: dict[str, Size]) -> RunState:
    """Make all arrays before anyone writes, then state.json, which makes the folder a run."""
    check_folder(folder)  # again: only under the lock can no other run change it
    needed, free = canvas_nbytes(levels), shutil.disk_usage(folder).free
    if free < needed:
        raise CanvasError(
            f"{folder} must have room for the latents, {needed / 2**20:,.0f} MiB; {free / 2**20:,.0f} MiB "
            "are free. Free some space, choose another output.folder or a smaller canvas."
        )
    root = zarr.open_group(LocalStore(folder / "canvas.zarr"), mode="w", zarr_format=3)
    for name, (height, width) in levels.items():
        for buffer in (0, 1):
            root.create_array(
                f"{name}/latent_{buffer}",
                shape=(LATENT_CHANNELS, height, width),
                chunks=(LATENT_CHANNELS, BAND, BAND),
                dtype="float32",
                fill_value=float("nan"),  # a missing chunk shows up instead of reading as zeros
                filters=None,
                serializer=BytesCodec(),
                compressors=Crc32cCodec(),  # latents are noise: zstd saves 8 % and costs x2-5 on reads
            )
    fsync_tree(folder / "canvas.zarr")
    state = RunState(keys, Progress(), dict.fromkeys(levels))
    save_state(folder / "state.json", state)
    fsync(folder.parent)
    return state


def _sweep(folder: Path) -> None:
    """Remove what writers killed in the middle left behind; a chunk counts from its rename on."""
    inside = (partial for store in folder.glob("*.zarr") for partial in store.rglob("*.partial"))
    for partial in [*inside, *folder.glob("*.partial")]:
        remove(partial)
