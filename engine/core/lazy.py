"""Arrays that are read when they are asked for: dask arrays over files, opened in the process that computes.

Reading only: nothing here writes, and nothing that samples or trains comes here. A `Source` is small and travels by
pickle; what it opens is kept open once per process. Names are a function of what is read, so that equal arrays are one
to dask, today and tomorrow. dask is imported on use: that takes half a second, and few ask for it.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    import dask.array as da

CHUNK_PX = 2048
"""Rows and columns of a chunk: 12 MB of RGB, for which dask's own millisecond per task does not count."""
KEPT_OPEN = 16
"""Handles of a process; the least used goes first."""
T = TypeVar("T")


class Source(Protocol):
    """What reads windows of something on disk; picklable."""

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """Return a window, (channels, y1-y0, x1-x0). Raises: EngineError if it cannot be read."""
        ...


def lazy_array(
    source: Source, shape: tuple[int, int, int], dtype: Any, name: tuple[str, *tuple[Hashable, ...]],
    chunks: int = CHUNK_PX,
) -> "da.Array":  # fmt: skip
    """Return a dask array (channels, y, x) whose blocks of `chunks` × `chunks` px are read from a source.

    `name` is what it is, in a word, and everything that decides its values. Raises: ConfigError for chunks below 1.
    """
    from dask.base import tokenize

    if chunks < 1:
        raise ConfigError(f"chunks must be at least 1 px on a side; got {chunks}. 2048 is a good size.")
    kind, *said = name
    cuts: Any = (shape[0], min(chunks, max(shape[1], 1)), min(chunks, max(shape[2], 1)))
    # A getter of our own is never merged with a slice that follows: what a block holds never depends on who asks.
    return _dask_array().from_array(
        _Windows(source, shape, np.dtype(dtype)), chunks=cuts, name=f"{kind}-{tokenize(*said, chunks)}", lock=False,
        asarray=False, fancy=False, inline_array=True, getitem=_read_block, meta=np.empty((0, 0, 0), dtype),
    )  # fmt: skip


class _DaskArray(Protocol):
    """What is used of dask.array, whose own annotations are partial."""

    @property
    def from_array(self) -> "Callable[..., da.Array]": ...


def _dask_array() -> _DaskArray:
    import dask.array

    return dask.array


class _Windows:
    """A source as dask wants it: shape, dtype, and blocks by slices."""

    ndim = 3

    def __init__(self, source: Source, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        self.source, self.shape, self.dtype = source, shape, dtype

    def __getitem__(self, index: tuple[slice, slice, slice]) -> NDArray[Any]:
        channels, ys, xs = (part.indices(size) for part, size in zip(index, self.shape, strict=True))
        return self.source.read(ys[0], ys[1], xs[0], xs[1])[channels[0] : channels[1]]


def _read_block(
    windows: _Windows, index: tuple[slice, slice, slice], asarray: object = None, lock: object = None
) -> NDArray[Any]:
    return windows[index]


_OPEN: "OrderedDict[Hashable, Any]" = OrderedDict()
_LOCK = threading.RLock()  # what is opened may open its parent


def opened(key: Hashable, open_it: Callable[[], T]) -> T:
    """Return what is open under a key in this process; open it if it is not. Raises: what `open_it` raises."""
    here = os.getpid(), key  # a forked child must not read through its parent's handles
    with _LOCK:
        if here not in _OPEN:
            _OPEN[here] = open_it()
        _OPEN.move_to_end(here)
        while len(_OPEN) > KEPT_OPEN:
            _OPEN.popitem(last=False)  # dropped, not closed: another thread may still read it
        return _OPEN[here]


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Return what tells one state of a file from another: path, time of change (ns), bytes.

    Of a Zarr folder they are those of its metadata. Raises: EngineError if there is nothing.
    """
    found = next((file for name in ("zarr.json", ".zattrs") if (file := path / name).is_file()), path)
    try:
        facts = found.stat()
    except OSError as error:
        raise EngineError(f"{path} must be a file or folder; {error.strerror}. Check the path.") from error
    return str(path.resolve()), facts.st_mtime_ns, facts.st_size


def as_rgb(array: Any) -> Any:
    """Return a numpy or dask array of a picture as (h, w, 3); it comes so or as (3, h, w), and stays lazy.

    Raises: ConfigError unless it is uint8 of one of these shapes.
    """
    shape: tuple[int, ...] = getattr(array, "shape", None) or ()
    if len(shape) != 3 or 3 not in (shape[0], shape[2]) or getattr(array, "dtype", None) != np.uint8 or 0 in shape:
        raise ConfigError(
            f"a picture must be uint8 (h, w, 3) or (3, h, w); got {getattr(array, 'dtype', type(array).__name__)} "
            f"{shape}. Convert it first."
        )
    return array if shape[2] == 3 else array.transpose(1, 2, 0)
