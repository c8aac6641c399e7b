"""The zarr state of a run: two buffers per level; what state.json names is whole, whatever interrupts.

It knows rows of latents and steps, not models, tiles or pictures, nor on what the latents lie (`Storage`).
"""

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np

from engine.canvas.arrays import BAND, Size, array_path, canvas_nbytes, check_marks, mark, open_array
from engine.canvas.run_state import Progress, RunState, check_run_keys
from engine.canvas.storage import FolderStorage, Storage
from engine.core.chunk_writes import write_region
from engine.core.errors import CanvasError, CanvasMismatchError
from engine.core.files import plain, write_atomically
from engine.core.units import LATENT_CHANNELS

__all__ = ["BAND", "Canvas", "Progress", "canvas_nbytes"]


class Canvas:
    """The latents of one run. Steps read the committed buffers and write the others; `commit` swaps them."""

    def __init__(self, folder: Path, storage: Storage, home: FolderStorage, state: RunState,
                 levels: dict[str, Size]) -> None:  # fmt: skip
        """Use `Canvas.open`."""
        self.folder = folder
        self.levels = dict(levels)
        """Name → (h, w) in latent px."""
        self._storage = storage
        self._home = home
        """The run folder: the storage itself, or where a picture is made from latents that lie elsewhere."""
        self._state = state
        arrays, self._pair = storage.arrays, (2 * state.writer, 2 * state.writer + 1)
        used = {(n, b) for n, committed in state.buffers.items() for b in (committed, *self._pair) if b is not None}
        self._arrays = {(n, b): open_array(arrays, self._place, n, b, levels[n]) for n, b in used}
        self._written: dict[str, set[int]] = {}
        self._marking = Lock()
        check_marks(self._arrays, state, f"{storage.where}/state.json")

    @classmethod
    def open(
        cls, folder: Path, keys: dict[str, object], levels: dict[str, Size], storage: Storage | None = None
    ) -> Self:
        """Create the run in this folder, or continue the one that lies there. Close it after use.

        `keys` decide the picture's bytes, flat and JSON-able; `levels` are (h, w) in latent px; `storage` is where the
        latents lie, None for the folder.
        Raises: CanvasMismatchError if another plan lives there, naming the keys; CanvasError if the folder or the
        storage is foreign, in use, damaged, not writable, too small or does not answer.
        """
        keys = plain(keys | {f"plan.levels.{name}": size for name, size in levels.items()})
        home = FolderStorage(folder)
        place = home if storage is None else storage
        home.check()
        place.check()
        with ExitStack() as on_error:
            on_error.callback(home.unlock)
            home.lock()
            _check_home(home, keys, place)
            if place is not home:
                on_error.callback(place.unlock)
                place.lock()
            state = place.begin(keys, levels)
            if place is not home:
                state = _join(home, state, place.url)
            try:
                canvas = cls(folder, place, home, state, levels)
            except place.unreachable as error:
                raise place.failed(error, "the arrays cannot be opened") from error
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
        except self._storage.unreachable as error:
            raise self._storage.failed(error, f"{array.path}, rows {y0}..{y1}, cannot be read") from error
        except (ValueError, RuntimeError, OSError) as error:  # what zarr raises on a truncated or changed chunk
            raise self._damaged(array, y0, y1) from error
        if np.isnan(rows).any():
            raise self._damaged(array, y0, y1)
        return rows

    def write(self, level: str, y0: int, rows: np.ndarray) -> None:
        """Write rows, float32 (3, n, w), into the level's other buffer; they count from `commit` on.

        One band at a time: y0 is a multiple of 256 and the rows are 256 or the last remainder, so that no two
        writers ever share a chunk. Threads may write bands side by side; `commit` waits for none of them.
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
        self._storage.hold()
        array = self._arrays[level, self._other(level)]
        try:
            with self._marking:
                if level not in self._written:
                    mark(array, None)
                    self._written[level] = set()
            write_region(array, np.s_[:, y0 : y0 + wanted[1]], rows)
            self._storage.settle(array.path, y0 // BAND, -(-width // BAND))
        except (OSError, *self._storage.unreachable) as error:
            what = f"{array.path}, rows {y0}..{y0 + wanted[1]}, cannot be written"
            raise self._storage.failed(error, what, canvas_nbytes(self.levels)) from error
        self._written[level].add(y0 // BAND)

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
        for level in chosen:
            array = self._arrays[level, self._other(level)]
            try:
                mark(array, self._state.commits + 1)
            except (OSError, *self._storage.unreachable) as error:
                raise self._storage.failed(error, f"{array.path} cannot be marked") from error
        self._storage.sync(array_path(level, self._other(level)) for level in chosen)
        progress = Progress(pass_index=pass_index, steps=steps)
        state = replace(self._state, progress=progress, buffers=buffers, commits=self._state.commits + 1)
        self._storage.save(state)
        self._state = state
        for level in chosen:
            del self._written[level]

    def record(self, *, decoded_px: int | None = None, finished: bool | None = None) -> None:
        """Note how far decoding and export are; the caller makes the pixels durable first (`Image.write`).

        It is noted in the run folder, where the pixels are.
        """
        now = self.progress
        decoded = now.decoded_px if decoded_px is None else decoded_px
        done = now.finished if finished is None else finished
        state = replace(self._state, progress=replace(now, decoded_px=decoded, finished=done))
        self._home.save(state if self._home is self._storage else replace(state, store=self._storage.url))
        self._state = state

    @contextmanager
    def shared(self, name: str) -> Generator[Path]:
        """Give the path of a file of the run folder that a resume must not make anew, wherever it goes on.

        When the latents lie elsewhere, the one that is kept there replaces it first; if there is none, what the caller
        leaves is kept. Raises CanvasError.
        """
        path = self.folder / name
        elsewhere = self._storage is not self._home
        kept = self._storage.record(name) if elsewhere else None
        if kept is not None:
            write_atomically(path, kept)
        yield path
        if elsewhere and kept is None and path.exists():
            self._storage.keep(name, path.read_bytes())

    def close(self) -> None:
        """Let another run use the folder; harmless when repeated."""
        try:
            self._storage.unlock()
        finally:
            self._home.unlock()

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
        first, second = self._pair
        return second if self._state.buffers[level] == first else first

    @property
    def _place(self) -> str:
        return f"{self._storage.where}/canvas.zarr"

    def _damaged(self, array: Any, y0: int, y1: int) -> CanvasError:
        """Find the first chunk of these rows that cannot be used; zarr's own messages name none."""
        where, why = "unknown", "cannot be read"
        for cy in range(y0 // BAND, -(-y1 // BAND)):
            for cx in range(-(-array.shape[2] // BAND)):
                try:
                    block = np.asarray(array[:, cy * BAND : (cy + 1) * BAND, cx * BAND : (cx + 1) * BAND])
                    problem = "is missing" if np.isnan(block).any() else None
                except self._storage.unreachable as error:
                    raise self._storage.failed(error, f"{array.path} cannot be read") from error
                except (ValueError, RuntimeError, OSError) as error:
                    problem = f"is damaged ({str(error).splitlines()[0][:60]})"
                if problem and where == "unknown":
                    where, why = f"0/{cy}/{cx}", problem
        p = self.progress
        return CanvasError(
            f"{self._place}: chunk c/{where} of {array.path} {why}; it holds pass "
            f"{p.pass_index}, step {p.steps}. Restore the file from a backup, or remove "
            f"{self._storage.where} and run again."
        )


def _check_home(home: FolderStorage, keys: dict[str, object], place: Storage) -> None:
    """Refuse a run folder of another run, or of one with its latents elsewhere; touches nothing."""
    if place is not home and place.url == home.url:
        raise CanvasError(f"canvas.store must be another folder than output.folder; both are {home.where}. Drop it.")
    state, store = home.load(), None if place is home else place.url
    if state is not None:
        check_run_keys(home.where, state.keys, keys)
        if state.store != store:
            raise CanvasMismatchError(
                f"{home.where} holds a run with its latents in {state.store or 'the folder itself'}; got "
                f"canvas.store={store}. Use the old value, or another output.folder."
            )


def _join(home: FolderStorage, state: RunState, url: str) -> RunState:
    """Make the folder one of a run elsewhere; return its state, with what of the picture is decoded in this folder."""
    home.sweep()
    before = home.load()
    if before is not None and before.commits == state.commits:
        progress = replace(state.progress, decoded_px=before.progress.decoded_px, finished=before.progress.finished)
        return replace(state, progress=progress)
    home.save(replace(state, store=url))
    return state
