"""The decoded picture: OME-Zarr 0.5, uint8 (c, y, x), written in bands and reduced by box averages.

A written band is on the disk when `write` returns, and a lost chunk is an error instead of black pixels. It
knows no latents. Source: OME-NGFF 0.5; Zarr 3; half-pixel shifts of box averages as `translation`.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
import zarr.errors
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.storage import LocalStore

from engine.core.chunk_writes import write_region
from engine.core.errors import CanvasError
from engine.core.files import disk_error, fsync, fsync_tree

CHUNK_PX = 512
"""Rows and columns of a chunk."""
BAND_PX = 2 * CHUNK_PX
"""Rows written at once: 256 latent rows."""
TOP_PX = 512
"""The coarsest pyramid level fits into a square of this size."""
PROVENANCE = "zoomldm_engine"
"""Group attribute that labels the picture as synthetic."""
_CHANNELS = (("Red", "FF0000"), ("Green", "00FF00"), ("Blue", "0000FF"))


class Image:
    """An RGB pyramid on disk; level 0 is the picture itself."""

    def __init__(self, path: Path, group: Any) -> None:
        """Use `Image.create` or `Image.open`."""
        self.path = path
        self._group = group
        datasets = group.attrs["ome"]["multiscales"][0]["datasets"]
        self._arrays = [group[d["path"]].with_config({"write_empty_chunks": True}) for d in datasets]
        self.mpp_um: float = datasets[0]["coordinateTransformations"][0]["scale"][1]
        """Size of a level-0 px in µm."""
        self.provenance: dict[str, Any] = group.attrs[PROVENANCE]
        """Where the picture comes from; says synthetic: true."""

    @classmethod
    def create(cls, path: Path, height: int, width: int, mpp_um: float, name: str, provenance: dict[str, Any]) -> Self:
        """Make an empty picture (px), replacing what lies at the path. Raises CanvasError if the disk refuses."""
        try:
            group = zarr.open_group(LocalStore(path), mode="w", zarr_format=3)
            group.attrs[PROVENANCE] = {"synthetic": True, **provenance}
            _create_level(group, 0, height, width)
            group.attrs["ome"] = ngff_metadata(name, mpp_um, 1)
            fsync_tree(path)
            fsync(path.parent)
        except OSError as error:
            raise disk_error(error, f"{path} cannot be made", path.parent) from error
        return cls(path, group)

    @classmethod
    def of_rows(
        cls, path: Path, rows: Iterable[np.ndarray], size: tuple[int, int], mpp_um: float, name: str,
        provenance: dict[str, Any],
    ) -> Self:  # fmt: skip
        """Make a whole picture of (h, w) px with its pyramid from a stream of rows, uint8 (3, any, w).

        Raises: ValueError if the rows do not fill it; CanvasError if the disk refuses.
        """
        image = cls.create(path, *size, mpp_um, name, provenance)
        for _ in image.fill(rows):
            pass
        if max(size) > TOP_PX:
            image.build_pyramid()
        return image

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a picture made by `create`. Raises CanvasError if it is not one."""
        try:
            return cls(path, zarr.open_group(LocalStore(path), mode="r+"))
        except (OSError, ValueError, KeyError, TypeError, IndexError, zarr.errors.BaseZarrError) as error:
            raise CanvasError(
                f"{path} must be an OME-Zarr picture of this engine; it cannot be opened ({error}). Remove it and "
                "decode again."
            ) from error

    @property
    def height(self) -> int:
        """Rows of level 0 in px."""
        return self._arrays[0].shape[1]

    @property
    def width(self) -> int:
        """Columns of level 0 in px."""
        return self._arrays[0].shape[2]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(h, w) in px of each level that is there, finest first."""
        return [array.shape[1:] for array in self._arrays]

    def read(self, y0: int, y1: int, x0: int = 0, x1: int | None = None, level: int = 0) -> np.ndarray:
        """Return a window as uint8 (3, y1-y0, x1-x0), in px of that level.

        Raises: CanvasError naming level and chunk if one is missing or damaged; ValueError outside the level.
        """
        array = self._arrays[level]
        height, width = array.shape[1:]
        right = width if x1 is None else x1
        if not (0 <= y0 < y1 <= height and 0 <= x0 < right <= width):
            raise ValueError(
                f"a window must lie in {height} x {width} px of level {level}; got "
                f"rows {y0}..{y1}, columns {x0}..{right}."
            )
        chunks = _chunks(y0, y1, x0, right)
        for index in chunks:
            if not (self.path / str(level) / "c" / index).exists():  # zarr would read it as black
                raise self._damaged(f"chunk c/{index} of level {level} is missing")
        try:
            return np.asarray(array[:, y0:y1, x0:right])
        except (ValueError, RuntimeError, OSError) as error:  # what zarr raises on a truncated or changed chunk
            which = chunks[0] if len(chunks) == 1 else f"one of {chunks[0]}..{chunks[-1]}"
            raise self._damaged(f"chunk c/{which} of level {level} is damaged ({error})") from error

    def write(self, y0: int, rows: np.ndarray) -> None:
        """Write rows of level 0, uint8 (3, n, w); on the disk when this returns.

        y0 is a multiple of 512, and n too unless the rows reach the end: two writers never share a chunk.
        Raises: ValueError for other shapes; CanvasError if the disk refuses.
        """
        n, end = rows.shape[1], y0 + rows.shape[1]
        aligned = y0 % CHUNK_PX == 0 and (n % CHUNK_PX == 0 or end == self.height)
        inside = rows.shape == (3, n, self.width) and 0 <= y0 < end <= self.height
        if not (aligned and inside and rows.dtype == np.uint8):
            raise ValueError(
                f"rows must be uint8 (3, n, {self.width}) in multiples of {CHUNK_PX} up to {self.height}; got "
                f"{rows.dtype} {rows.shape} at y0={y0}."
            )
        chunks = self.path / "0" / "c"
        try:
            write_region(self._arrays[0], np.s_[:, y0:end], rows)
            written = [chunks / index for index in _chunks(y0, end, 0, self.width)]
            for path in [*written, *{p.parent for p in written}, chunks / "0", chunks]:
                fsync(path)
        except OSError as error:
            needed = 4 * self.height * self.width  # three bytes per px and a third for the pyramid, uncompressed
            raise disk_error(error, f"{self.path}, rows {y0}..{end}, cannot be written", self.path, needed) from error

    def fill(self, rows: Iterable[np.ndarray], start: int = 0) -> Iterator[int]:
        """Write a stream of rows, uint8 (3, any, w), from row `start` on; yield how many rows are on the disk.

        `start` is what the last call yielded before it was interrupted. Raises as `write` does; ValueError if the
        stream ends early.
        """
        y0, got, band = start, start, np.empty((3, BAND_PX, self.width), np.uint8)
        for part in rows:
            if part.dtype != np.uint8 or part.shape[::2] != (3, self.width):
                raise ValueError(f"rows must be uint8 (3, n, {self.width}); got {part.dtype} {part.shape}.")
            taken = 0
            while taken < part.shape[1] and y0 < self.height:
                end = min(y0 + BAND_PX, self.height)
                n = min(part.shape[1] - taken, end - got)
                band[:, got - y0 : got - y0 + n] = part[:, taken : taken + n]
                taken, got = taken + n, got + n
                if got == end:
                    self.write(y0, band[:, : end - y0])
                    y0 = end
                    yield y0
            got += part.shape[1] - taken
        if y0 < self.height or got > self.height:
            raise ValueError(f"the rows must fill the picture, {self.height} px; {got} came.")

    def build_pyramid(self) -> None:
        """Add levels, each half as large, until one fits into 512 px; replaces levels that are there.

        Chunk by chunk, so that memory does not grow with the picture. The metadata names the levels last.
        Raises: CanvasError if level 0 is incomplete or the disk refuses.
        """
        name, mpp = self._group.attrs["ome"]["multiscales"][0]["name"], self.mpp_um
        self._arrays = self._arrays[:1]
        try:
            self._group.attrs["ome"] = ngff_metadata(name, mpp, 1)
            while max(self.sizes[-1]) > TOP_PX:
                height, width = (-(-s // 2) for s in self.sizes[-1])
                array = _create_level(self._group, len(self._arrays), height, width)
                self._arrays.append(array.with_config({"write_empty_chunks": True}))
                self._fill(len(self._arrays) - 1)
            self._group.attrs["ome"] = ngff_metadata(name, mpp, len(self._arrays))
            fsync(self.path / "zarr.json")
        except OSError as error:
            raise disk_error(error, f"the pyramid of {self.path} cannot be written", self.path) from error

    def _fill(self, level: int) -> None:
        (height, width), (fine_h, fine_w) = self.sizes[level], self.sizes[level - 1]
        for y0 in range(0, height, CHUNK_PX):
            for x0 in range(0, width, CHUNK_PX):
                y1, x1 = min(y0 + CHUNK_PX, height), min(x0 + CHUNK_PX, width)
                fine = self.read(2 * y0, min(2 * y1, fine_h), 2 * x0, min(2 * x1, fine_w), level - 1)
                write_region(self._arrays[level], np.s_[:, y0:y1, x0:x1], halve(fine))
        fsync_tree(self.path / str(level))

    def _damaged(self, what: str) -> CanvasError:
        return CanvasError(f"{self.path}: {what}. Remove {self.path} and run the same command to decode again.")


def is_ours(path: Path) -> bool:
    """Say whether a folder is a picture that this engine wrote, in which no chunk may be missing."""
    try:
        return PROVENANCE in json.loads((path / "zarr.json").read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):  # then it is another program's, and read as a slide
        return False


def halve(block: np.ndarray) -> np.ndarray:
    """Average 2x2 px, rounded: uint8 (3, h, w) → (3, ceil(h/2), ceil(w/2)); an odd border averages what is there."""
    wide = np.pad(block, ((0, 0), (0, block.shape[1] % 2), (0, block.shape[2] % 2)), mode="edge").astype(np.uint16)
    total = wide[:, ::2, ::2] + wide[:, 1::2, ::2] + wide[:, ::2, 1::2] + wide[:, 1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)


def _chunks(y0: int, y1: int, x0: int, x1: int) -> list[str]:
    rows, columns = range(y0 // CHUNK_PX, -(-y1 // CHUNK_PX)), range(x0 // CHUNK_PX, -(-x1 // CHUNK_PX))
    return [f"0/{y}/{x}" for y in rows for x in columns]


def _create_level(group: Any, level: int, height: int, width: int) -> Any:
    return group.create_array(
        str(level),
        shape=(3, height, width),
        chunks=(3, CHUNK_PX, CHUNK_PX),
        dtype="uint8",
        filters=None,
        serializer=BytesCodec(),
        compressors=ZstdCodec(level=3, checksum=True),  # without the checksum a flipped bit goes unnoticed
        dimension_names=("c", "y", "x"),
        overwrite=True,
    )


def ngff_metadata(name: str, mpp_um: float, levels: int) -> dict[str, Any]:
    """Return the `ome` attribute of OME-NGFF 0.5; the centre of the first px of level 0 is the origin."""

    def dataset(level: int) -> dict[str, object]:
        size, shift = mpp_um * 2**level, mpp_um * (2**level - 1) / 2
        return {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, size, size]},
                {"type": "translation", "translation": [0.0, shift, shift]},
            ],
        }

    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": name,
                "axes": [
                    {"name": "c", "type": "channel"},
                    {"name": "y", "type": "space", "unit": "micrometer"},
                    {"name": "x", "type": "space", "unit": "micrometer"},
                ],
                "datasets": [dataset(level) for level in range(levels)],
                "type": "box average 2x2",
            }
        ],
        "omero": {
            "name": name,
            "channels": [
                {"label": label, "color": color, "active": True,
                 "window": {"min": 0, "max": 255, "start": 0, "end": 255}}
                for label, color in _CHANNELS
            ],
            "rdefs": {"model": "color"},
        },
    }  # fmt: skip
