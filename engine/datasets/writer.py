"""Write a prepared set: blocks of a slide in any order, then slide.json, which makes the slide count.

Invariant: a block that `write` has returned from survives a kill and a power cut and is not asked for again; a slide
that is not finished is invisible to readers. Files are written at their final size from the start, so a full disk
shows early. It does not know how latents and vectors come about.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import BagError, PreparedError
from engine.core.files import disk_error, fsync, remove, replacing, write_atomically, write_json
from engine.datasets.schema import (
    DATASET,
    SLIDE,
    SLIDES,
    SetFacts,
    SlideFacts,
    array_files,
    check_set_facts,
    read_set_facts,
)
from engine.slides.slide import check_slide_name

JOURNAL = "journal"
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class PatchPlan:
    """Which patches and cells of a slide are to come."""

    needed: NDArray[np.bool_]
    """(H, W): base cells under any patch."""
    places: Mapping[str, NDArray[np.int32]]
    """Magnification → first cell (y, x) of each patch: (N, 2)."""
    tissue: Mapping[str, NDArray[np.float32]]
    """Magnification → (N,) share of tissue."""

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(places) for name, places in self.places.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of all of it: blocks of equal plans fit together."""
        sha = hashlib.sha256(f"{self.needed.shape}".encode() + np.packbits(self.needed).tobytes())
        for name in sorted(self.places):
            sha.update(f"{name} {len(self.places[name])}\n".encode())
            sha.update(self.places[name].tobytes() + self.tissue[name].tobytes())
        return sha.hexdigest()


def open_set(folder: Path, facts: SetFacts) -> None:
    """Make a folder the place of a set, or find it to be. Raises: PreparedMismatchError; CanvasError."""
    path = folder / DATASET
    if path.exists():
        check_set_facts(folder, read_set_facts(folder), asdict(facts))
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(facts))


def slide_folder(folder: Path, slide: str) -> Path:
    """Return the folder of a slide. Raises PreparedError for a name that cannot be one, or a link."""
    try:
        check_slide_name(slide)
    except BagError as error:
        raise PreparedError(str(error)) from error
    path = folder / SLIDES / slide
    if path.is_symlink():
        raise PreparedError(f"{path} must be a folder; it is a link. Remove the link.")
    return path


def journal_of(folder: Path, slide: str) -> tuple[str, frozenset[int]]:
    """Return the digest of an unfinished slide's plan and the blocks that are written; "" and none if it is new."""
    path = slide_folder(folder, slide) / JOURNAL
    if not path.is_file():
        return "", frozenset()
    digest, *lines = path.read_text(errors="replace").split("\n")
    return digest, frozenset(int(line) for line in lines[:-1] if line.isdecimal())  # the last one may be torn


class PreparedWriter:
    """The files of one slide, on their way; one writer at a time."""

    def __init__(self, folder: Path, shared: SetFacts, facts: SlideFacts, plan: PatchPlan) -> None:
        """Take up what is there of the same plan, else begin. `facts.counts` are taken from the plan.

        Raises: PreparedError for a bad name; CanvasError if the disk refuses.
        """
        self.folder, self.shared, self.plan = slide_folder(folder, facts.slide), shared, plan
        self.facts = replace(facts, counts=plan.counts)
        digest, done = journal_of(folder, facts.slide)
        self.done = set(done) if digest == plan.digest else set()
        self._files = array_files(self.facts, shared)
        try:
            if self.done:  # written again, because a kill may have torn its last line
                lines = [plan.digest, *map(str, sorted(self.done))]
                write_atomically(self.folder / JOURNAL, ("\n".join(lines) + "\n").encode())
            else:
                self._begin()
        except OSError as error:
            raise disk_error(error, f"{self.folder} cannot be written", folder) from error

    def _begin(self) -> None:
        remove(self.folder)
        self.folder.mkdir(parents=True)
        for name, (shape, dtype) in self._files.items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            mag, _, kind = name.rpartition("/")
            known = {"places.npy": self.plan.places, "tissue.npy": self.plan.tissue}.get(kind)
            with path.open("wb") as file:
                _write_header(file, shape, dtype)
                if known is not None:
                    file.write(np.ascontiguousarray(known[mag], dtype).tobytes())
                    continue
                blank = np.full((1, *shape[1:]), np.nan if dtype.kind == "f" else 0, dtype).tobytes()
                for _ in range(shape[0]):
                    file.write(blank)
            fsync(path)
        (self.folder / JOURNAL).write_text(f"{self.plan.digest}\n")
        fsync(self.folder / JOURNAL)
        fsync(self.folder)

    def write(
        self,
        block: int,
        cells: tuple[NDArray[np.integer], NDArray[np.floating]] | None = None,
        patches: tuple[str, int, Mapping[str, NDArray[Any]]] | None = None,
    ) -> None:
        """Store a block. `cells`: places (m, 2) (y, x) and vectors (m, D); `patches`: magnification, first row and
        arrays by name ("latents" (n, 3, 64, 64), "images", "grids"). A row that is NaN throughout is damaged.

        Raises: PreparedError for another shape or values that are not finite; CanvasError if the disk refuses.
        """
        rows: list[tuple[str, tuple[int, ...], NDArray[Any]]] = []
        if cells is not None:
            rows += [("cells.npy", (int(y), int(x)), v) for (y, x), v in zip(*cells, strict=True)]
        if patches is not None:
            mag, first, arrays = patches
            rows += [(f"{mag}/{kind}.npy", (first + i,), v) for kind, a in arrays.items() for i, v in enumerate(a)]
        by_file: dict[str, list[tuple[tuple[int, ...], NDArray[Any]]]] = {}
        for name, at, values in rows:
            by_file.setdefault(name, []).append((at, self._checked(name, at, values)))
        try:
            for name, found in by_file.items():
                self._store(name, found)
            with (self.folder / JOURNAL).open("a") as journal:
                journal.write(f"{block}\n")
                journal.flush()
                os.fsync(journal.fileno())
        except OSError as error:
            raise disk_error(error, f"{self.folder} cannot be written", self.folder.parent) from error
        self.done.add(block)

    def _checked(self, name: str, at: tuple[int, ...], values: NDArray[Any]) -> NDArray[Any]:
        shape, dtype = self._files[name]
        where = f"{self.folder / name}, row {at}"
        if values.shape != shape[len(at) :] or not all(0 <= i < n for i, n in zip(at, shape, strict=False)):
            raise PreparedError(f"{where} must be {shape[len(at) :]} within {shape}; got {values.shape}.")
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                narrow = values.astype(dtype)
            if not np.isfinite(narrow).all() and not np.isnan(values).all():
                raise PreparedError(f"{where} must be finite in float16; got NaN or values beyond 65504.")
            return narrow
        return np.ascontiguousarray(values, dtype)

    def _store(self, name: str, rows: Sequence[tuple[tuple[int, ...], NDArray[Any]]]) -> None:
        """Write rows in place. Not through a map: on a full disk that would end the process by a signal."""
        shape, dtype = self._files[name]
        with (self.folder / name).open("r+b") as file:
            start = (self.folder / name).stat().st_size - int(np.prod(shape)) * dtype.itemsize
            for at, values in rows:
                index = int(np.ravel_multi_index(at, shape[: len(at)]))
                file.seek(start + index * values.nbytes)
                file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def damaged(self) -> dict[str, NDArray[np.bool_]]:
        """Return by magnification which patches (N,) have NaN in their latent or under them."""
        bad = np.zeros(self.plan.needed.shape, np.bool_)
        if "cells.npy" in self._files:
            bad = np.isnan(self._load("cells.npy")[..., 0]) & self.plan.needed
        total = np.pad(bad.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
        found = {}
        for name, n in self.plan.counts.items():
            if not n:
                continue
            flags = np.isnan(self._load(f"{name}/latents.npy")[:, 0, 0, 0])
            if name not in self.facts.grid_sides:
                y, x = self.plan.places[name].T
                k = self.shared.scale.factor(name)
                flags |= total[y + k, x + k] - total[y, x + k] - total[y + k, x] + total[y, x] > 0
            found[name] = flags
        return found

    def finish(self) -> SlideFacts:
        """Leave damaged patches out, then make the slide count. Raises CanvasError if the disk refuses."""
        damaged = {name: flags for name, flags in self.damaged().items() if flags.any()}
        dropped = {name: int(flags.sum()) for name, flags in damaged.items()}
        kept = {name: n - dropped.get(name, 0) for name, n in self.plan.counts.items()}
        facts = replace(self.facts, counts=kept, dropped=dropped)
        try:
            # A kill between two files leaves them of different lengths: without its journal, the slide begins anew.
            if damaged:
                remove(self.folder / JOURNAL)
            for name, flags in damaged.items():
                for path in sorted((self.folder / name).glob("*.npy")):
                    self._keep(path, ~flags)
            fsync(self.folder)
            write_json(self.folder / SLIDE, asdict(facts))
            remove(self.folder / JOURNAL)
        except OSError as error:
            raise disk_error(error, f"{self.folder} cannot be written", self.folder.parent) from error
        return facts

    def _keep(self, path: Path, kept: NDArray[np.bool_]) -> None:
        if not kept.any():
            remove(path)
            return
        rows = np.flatnonzero(kept)
        old = np.load(path, mmap_mode="r")
        with replacing(path) as partial, partial.open("wb") as file:
            _write_header(file, (len(rows), *old.shape[1:]), old.dtype)
            for i in range(0, len(rows), _ROWS_AT_ONCE):
                file.write(np.ascontiguousarray(old[rows[i : i + _ROWS_AT_ONCE]]).tobytes())

    def _load(self, name: str) -> NDArray[Any]:
        return np.load(self.folder / name, mmap_mode="r")


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
