"""The zarr arrays of latents: how they are made, found, held to their shape, and marked with the commit they hold.

The mark lies in the array itself, as an attribute, so that a state.json older than its latents shows: the buffer it
names was written again since. While a step is written into a buffer it has no mark. It knows names, shapes and chunks,
not which of them is committed or on what they lie.
Facts: zarr 3 writes are atomic per chunk only, on a disk by rename, in object storage by the store itself.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.codecs import BytesCodec, Crc32cCodec

from engine.canvas.run_state import RunState
from engine.core.errors import CanvasError
from engine.core.units import LATENT_CHANNELS

BAND = 256
"""Rows and columns of a chunk in latent px: the unit of writing."""
MARK = "commit"
"""Attribute of an array: the number of the commit it holds."""
_CRC_NBYTES = 4
Size = tuple[int, int]


class _Zarr(Protocol):
    """What is used of zarr, whose own annotations name types that are not installed."""

    def open_group(self, store: Store, *, mode: Literal["w", "a"], zarr_format: Literal[3]) -> zarr.Group: ...
    def open_array(self, store: Store, *, path: str, mode: Literal["r", "r+"]) -> "zarr.Array[Any]": ...


_zarr: _Zarr = zarr


def canvas_nbytes(levels: dict[str, Size]) -> int:
    """Return the bytes of both buffers of all levels (latent px) as stored; border chunks are stored whole."""
    chunks = sum(-(-h // BAND) * -(-w // BAND) for h, w in levels.values())
    return 2 * chunks * (LATENT_CHANNELS * BAND * BAND * 4 + _CRC_NBYTES)


def array_path(level: str, buffer: int) -> str:
    """Return the name of an array below canvas.zarr."""
    return f"{level}/latent_{buffer}"


def create_arrays(store: Store, levels: dict[str, Size], buffers: Iterable[int], mode: Literal["w", "a"]) -> None:
    """Make these buffers of all levels, (h, w) in latent px; "w" removes what was there. Raises what the store does."""
    root = _zarr.open_group(store, mode=mode, zarr_format=3)
    for buffer in buffers:
        for name, (height, width) in levels.items():
            root.create_array(
                array_path(name, buffer),
                shape=(LATENT_CHANNELS, height, width),
                chunks=(LATENT_CHANNELS, BAND, BAND),
                dtype="float32",
                fill_value=float("nan"),  # a missing chunk shows up instead of reading as zeros
                filters=None,
                serializer=BytesCodec(),
                compressors=Crc32cCodec(),  # latents are noise: zstd saves 8 % and costs x2-5 on reads
            )


def open_array(store: Store, where: str, name: str, buffer: int, size: Size, mode: Literal["r", "r+"] = "r+") -> Any:
    """Open one buffer of a level; `size` is (h, w) in latent px, `where` names the canvas in messages.

    Raises: CanvasError unless it is as `create_arrays` made it; what the store raises when it does not answer.
    """
    path = array_path(name, buffer)
    try:
        array = _zarr.open_array(store, path=path, mode=mode)
    except (OSError, ValueError, KeyError, TypeError, zarr.errors.BaseZarrError) as error:
        raise CanvasError(
            f"{where}: array {path} must be there; it cannot be opened ({error}). Restore "
            f"{path}/zarr.json from a backup, or remove the canvas with its state.json and run again."
        ) from error
    wanted = ((LATENT_CHANNELS, *size), (LATENT_CHANNELS, BAND, BAND), np.dtype("float32"))
    if (array.shape, array.chunks, array.dtype) != wanted or not np.isnan(array.fill_value):
        raise CanvasError(
            f"{where}: array {path} must be {wanted}; got {array.dtype} {array.shape} in chunks {array.chunks}. "
            f"Restore {path}/zarr.json from a backup, or remove the canvas with its state.json and run again."
        )
    # Rows are finite, the fill value is NaN: comparing every chunk with it costs a third of a write.
    return array.with_config({"write_empty_chunks": True})


def mark(array: Any, commit: int | None) -> None:
    """Note that a buffer holds this commit; None: nothing whole. Raises what the store does; durable with its files."""
    array.attrs[MARK] = commit


def check_marks(arrays: Mapping[tuple[str, int], Any], state: RunState, path: str) -> None:
    """Refuse a state whose committed buffers were written again after it; `path` is its state.json.

    Raises: CanvasError.
    """
    for level, buffer in state.buffers.items():
        if buffer is None:
            continue
        found = arrays[level, buffer].attrs.get(MARK, 0)  # none in runs begun before there were marks
        if found is None or found > state.commits:
            now = "is being written again" if found is None else f"holds commit {found}"
            raise CanvasError(
                f"{path} must be the newest there was; it is of commit {state.commits}, but "
                f"{array_path(level, buffer)}, which it names, {now}. Put the newer state.json back, or remove the run "
                "and start again."
            )
