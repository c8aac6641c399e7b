"""Write bags: blocks of rows in any order, by any process, then one file that appears whole.

Invariant: a block that `write` has returned from survives a kill and a power cut, and is not asked for again; the file
has the same bytes whatever the order and size of blocks. It does not know where features come from.
Until it is finished a bag is a folder beside its file: `SLIDE.h5.blocks/` with plan.json and one .npy per block. HDF5
itself would not do: a file that was open for writing when its process died cannot be trusted.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from engine.core.errors import BagError, BagMismatchError
from engine.core.files import disk_error, remove, replacing, write_atomically
from engine.features.bag_reader import BAG_VERSION
from engine.features.bag_schema import BagPlan, BagScale

BLOCKS = ".blocks"
"""Ending of the folder of an unfinished bag, behind the bag's own name."""
_CHUNK_BYTES = 2**19
_ROWS_AT_ONCE = 4096
_BLOCK = re.compile(r"(.+)_(\d{12})-(\d{12})\.npy")


class BagWriter:
    """The bag of one slide, on its way.

    A block has one writer at a time; different blocks may come from different processes, each with its own BagWriter
    of the same plan, once the first one stands. One of them calls `finish` at the end.
    """

    def __init__(self, path: Path, plan: BagPlan) -> None:
        """Take up the blocks that are there. Raises: BagMismatchError if they are of another plan; CanvasError."""
        self.path, self.plan = path, plan
        self.folder = _blocks_of(path)
        record = json.dumps(_record(plan), indent=1, sort_keys=True)
        stored = self.folder / "plan.json"
        try:
            if stored.is_file():
                _compare(stored, json.loads(stored.read_text()), json.loads(record))
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(stored, record.encode())
        except OSError as error:
            raise disk_error(error, f"{self.folder} cannot be written", path.parent) from error
        except ValueError as error:
            raise BagError(f"{stored} must say what the blocks are; it is damaged. Remove {self.folder}.") from error

    def missing(self, scale: str) -> list[tuple[int, int]]:
        """Return the row ranges [start, stop) that no block holds yet, ascending."""
        gaps, at = [], 0
        for start, stop, _ in _blocks(self.folder, scale):
            if start > at:
                gaps.append((at, start))
            at = max(at, stop)
        rows = len(self.plan.scale(scale).coords)
        return [*gaps, (at, rows)] if at < rows else gaps

    def masked(self, scale: str) -> int:
        """Return how many of the rows written so far are not valid."""
        count, at = 0, 0
        for start, stop, block in _blocks(self.folder, scale):
            count += int(np.isnan(block[max(at, start) - start :, 0]).sum())
            at = max(at, stop)
        return count

    def write(self, scale: str, start: int, features: NDArray[np.floating], valid: NDArray | None = None) -> None:
        """Store the features (n, D) of rows start … start + n; rows with `valid` (n,) 0 become NaN.

        Raises: BagError for another shape or values that are not finite; CanvasError if the disk refuses.
        """
        stop, rows = start + len(features), len(self.plan.scale(scale).coords)
        where = f"rows {start} to {stop} of {scale} of {self.plan.attributes.slide}"
        if features.ndim != 2 or features.shape[1] != self.plan.width or not 0 <= start <= stop <= rows:
            raise BagError(
                f"{where} must be (n, {self.plan.width}) within {rows} rows; got {features.shape}. The encoder is not "
                "the one the plan was made for."
            )
        good = np.ones(len(features), bool) if valid is None else np.asarray(valid).astype(bool)
        if good.shape != features.shape[:1]:
            raise BagError(f"{where} need one validity each; got {good.shape} for {len(features)}.")
        block = np.full(features.shape, np.nan, self.plan.dtype)
        with np.errstate(over="ignore"):  # found as infinite below
            block[good] = features[good]
        if not np.isfinite(block[good]).all():
            bad = start + int(np.flatnonzero(good & ~np.isfinite(block).all(axis=1))[0])
            raise BagError(
                f"{where} must be finite in {self.plan.dtype}; row {bad} is not. Use float32, or mark tiles that "
                "could not be read as invalid."
            )
        path = self.folder / f"{scale}_{start:012d}-{stop:012d}.npy"
        if len(block):
            with replacing(path, block.nbytes) as partial, partial.open("wb") as file:
                np.save(file, block, allow_pickle=False)

    def finish(self) -> Path:
        """Put the blocks together under the bag's name and drop them; return the path.

        Raises: BagError if rows are missing; CanvasError if the disk refuses, which loses no block.
        """
        for scale in self.plan.scales:
            gaps = self.missing(scale.name)
            if gaps:
                raise BagError(
                    f"{self.path} needs all rows of {scale.name}; {len(gaps)} ranges are missing, the first is "
                    f"{gaps[0][0]} to {gaps[0][1]}. Run the command again."
                )
        needed = sum(len(s.coords) for s in self.plan.scales) * self.plan.width * np.dtype(self.plan.dtype).itemsize
        with replacing(self.path, needed) as partial, h5py.File(partial, "w") as file:
            file.attrs["bag_version"] = BAG_VERSION
            file.attrs["scales"] = [scale.name for scale in self.plan.scales]
            for name, value in asdict(self.plan.attributes).items():
                if value is not None:
                    file.attrs[name] = value
            for scale in self.plan.scales:
                self._write_scale(file.create_group(scale.name), scale)
        discard_blocks(self.path)
        return self.path

    def _write_scale(self, group: h5py.Group, scale: BagScale) -> None:
        group.attrs["mpp"], group.attrs["tile_level0_px"] = scale.mpp, scale.tile_level0_px
        rows, width = len(scale.coords), self.plan.width
        per_chunk = max(1, _CHUNK_BYTES // (width * np.dtype(self.plan.dtype).itemsize))
        features = group.create_dataset(
            "features",
            (rows, width),
            self.plan.dtype,
            maxshape=(None, width),
            chunks=(per_chunk, width),
            fletcher32=True,  # damage inside the file is an error, not another feature
        )
        valid, at = np.zeros(rows, np.uint8), 0
        for start, stop, block in _blocks(self.folder, scale.name):
            for first in range(max(at, start), stop, _ROWS_AT_ONCE):
                part = np.asarray(block[first - start : first - start + _ROWS_AT_ONCE])
                features[first : first + len(part)] = part
                valid[first : first + len(part)] = np.isfinite(part).all(axis=1)
            at = max(at, stop)
        group.create_dataset("coords", data=scale.coords)
        group.create_dataset("valid", data=valid)
        if scale.parent is not None:
            group.create_dataset("parent", data=scale.parent)


def written(path: Path, scales: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Return which rows [start, stop) of the unfinished bag of a path are written, by scale; none without one."""
    return {scale: [(start, stop) for start, stop, _ in _blocks(_blocks_of(path), scale)] for scale in scales}


def _blocks(folder: Path, scale: str) -> Iterator[tuple[int, int, NDArray]]:
    """Yield whole blocks of one scale as start, stop and rows (mapped, not loaded), by start."""
    for path in sorted(folder.glob("*.npy")):
        found = _BLOCK.fullmatch(path.name)
        if found and found[1] == scale:
            try:
                block = np.load(path, mmap_mode="r", allow_pickle=False)
            except ValueError:
                continue  # it lost its end, though not by our doing: made again
            yield int(found[2]), int(found[3]), block


def discard_blocks(path: Path) -> None:
    """Drop the unfinished blocks of a bag, if there are any. Raises CanvasError."""
    try:
        remove(_blocks_of(path))
    except OSError as error:
        raise disk_error(error, f"{_blocks_of(path)} cannot be removed") from error


def write_bag(
    path: Path, plan: BagPlan, features: Mapping[str, NDArray], valid: Mapping[str, NDArray] | None = None
) -> Path:
    """Write a whole bag at once: features by scale, and which rows are valid (all, if not said)."""
    writer = BagWriter(path, plan)
    for scale in plan.scales:
        writer.write(scale.name, 0, features[scale.name], (valid or {}).get(scale.name))
    return writer.finish()


def find_unfinished(folder: Path) -> list[Path]:
    """Return the folders of unfinished bags in a folder, by name."""
    return sorted(path for path in folder.glob(f"*{BLOCKS}") if path.is_dir())


def _blocks_of(path: Path) -> Path:
    return path.with_name(path.name + BLOCKS)


def _record(plan: BagPlan) -> dict[str, object]:
    """Return what a block's values depend on, as JSON: attributes, sizes, and a digest of each scale's tiles."""
    scales = {}
    for scale in plan.scales:
        tiles = scale.coords.tobytes() + (b"" if scale.parent is None else scale.parent.tobytes())
        sizes = [len(scale.coords), scale.mpp, *scale.tile_level0_px]
        scales[scale.name] = [*sizes, hashlib.sha256(tiles).hexdigest()]
    attributes = asdict(plan.attributes)
    del attributes["code_version"]
    return {**attributes, "width": plan.width, "dtype": plan.dtype, "scales": scales}


def _compare(path: Path, old: dict[str, object], new: dict[str, object]) -> None:
    differing = [f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]]
    if differing:
        raise BagMismatchError(
            f"{path.parent} holds blocks made with other settings: {'; '.join(differing)[:600]}. Use the old settings "
            "or another output folder, or remove it to start this slide again."
        )
