"""The bag: the features of one slide in one HDF5 file, the only thing that classifiers share with the engine.

Invariant: a file under its name is complete, and rows of features, coords, parent and valid belong together. A tile
whose pixels could not be read has `valid` 0 and a row of NaN: who forgets `valid` meets NaN, never invented tissue.
It does not know slides, networks or how bags are written (bag_writer.py).

    /                attributes: BagAttributes, bag_version
    20x/features     (N, D) float32 or float16     20x/coords  (N, 2) int64, x and y of the top left, level-0 px
    20x/parent       (N,) int64, row of 5x         20x/valid   (N,) uint8
    5x/…             the same without parent; each group has attributes mpp (µm/px) and tile_level0_px (w, h)
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray

from engine.core.errors import BagError, BagMismatchError
from engine.features.bag_schema import BagAttributes, BagPlan, BagScale, differences
from engine.slides.slide import check_slide_name

__all__ = ["BagAttributes", "BagFile", "BagPlan", "BagScale", "bag_path", "bag_paths", "find_bags", "is_finished"]

BAG_VERSION = 1
"""Raise it when what lies in a bag changes its meaning."""
SUFFIX = ".h5"
Rows = slice | NDArray[np.integer]


def bag_path(folder: Path, slide: str) -> Path:
    """Return the file of a slide in a folder of bags. Raises BagError if it would lie, or points, elsewhere."""
    check_slide_name(slide)
    path = folder / (slide + SUFFIX)
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise BagError(f"{path} must be a plain file in {folder}; it is a link to {path.resolve()}. Remove the link.")
    return path


def bag_paths(folder: Path, slides: Sequence[str]) -> list[Path]:
    """Return the files of several slides. Raises BagError for two of one name: one would replace the other."""
    twice = sorted({name for name in slides if slides.count(name) > 1})
    if twice:
        raise BagError(
            f"slides must have different names, for each has one file; {', '.join(twice[:5])} comes more than once. "
            "Rename one, or extract them into different folders."
        )
    return [bag_path(folder, name) for name in slides]


def find_bags(folder: Path) -> list[Path]:
    """Return the finished bags of a folder by name; unfinished ones are folders and left out. Raises BagError."""
    if not folder.is_dir():
        raise BagError(f"{folder} must be a folder of bags (*{SUFFIX}); there is none. Check the path.")
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())


class BagFile:
    """A finished bag, read lazily; nothing but shapes and attributes is loaded unless asked for.

    May be sent to other processes (the open file stays behind). Raises: BagError if the file is damaged or foreign.

    >>> import engine, numpy as np
    >>> tissue = np.random.default_rng(0).integers((150, 50, 130), (220, 130, 200), (1024, 1024, 3)).astype(np.uint8)
    >>> slide = engine.Slide.from_array(tissue, mpp=0.5, name="case_7")
    >>> _ = engine.extract_features([slide], "runs/features", encoders=["texture"], progress=False)
    >>> with engine.Bag("runs/features/features/case_7.h5") as bag:
    ...     bag.scales, bag.features("5x").shape, bag.coords("5x").tolist()
    (('20x', '5x'), (1, 120), [[0, 0]])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        try:
            values = _attributes(self._opened())
            version = values.pop("bag_version", None)
            self.scales: tuple[str, ...] = tuple(str(name) for name in values.pop("scales", ()))
            if version != BAG_VERSION:
                raise BagMismatchError(
                    f"{path} must be a bag of version {BAG_VERSION}; its version is {version}. Read it with the "
                    "release that wrote it, or remove it and extract the slide again."
                )
            self.attributes = BagAttributes(**{f.name: _plain(values.get(f.name)) for f in fields(BagAttributes)})
            self._shapes = {name: self._dataset(name, "features").shape for name in self.scales}
        except (TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def shape(self, scale: str) -> tuple[int, int]:
        """Return (N, D) without reading. Raises BagError for an unknown scale."""
        if scale not in self._shapes:
            raise BagError(f"{self.path} holds {', '.join(self.scales)}; got {scale!r}. Choose one of them.")
        return self._shapes[scale]

    @property
    def dtype(self) -> str:
        """Of features on disk: "float32" or "float16"."""
        return self._dataset(self.scales[0], "features").dtype.name

    def features(self, scale: str, rows: Rows | None = None) -> Float[np.ndarray, "n d"]:
        """Return features (n, D): all, a slice, or rows by number in any order; NaN where `valid` is 0."""
        return self._read(scale, "features", rows)

    def coords(self, scale: str, rows: Rows | None = None) -> Int64[np.ndarray, "n 2"]:
        """Return (n, 2): x and y of the top left corners, level-0 px."""
        return self._read(scale, "coords", rows)

    def valid(self, scale: str, rows: Rows | None = None) -> Bool[np.ndarray, " n"]:
        """Return (n,): whether the tile's pixels could be read."""
        return self._read(scale, "valid", rows).astype(bool)

    def parent(self, scale: str, rows: Rows | None = None) -> Int64[np.ndarray, " n"]:
        """Return (n,): rows of the next coarser scale. Raises BagError on the coarsest."""
        if scale == self.scales[-1]:
            raise BagError(f"{scale} is the coarsest scale of {self.path} and has no parent. Ask a finer one.")
        return self._read(scale, "parent", rows)

    def scale_of(self, scale: str) -> BagScale:
        """Return coordinates, parents and sizes of one scale."""
        self.shape(scale)
        attributes = _attributes(self._opened()[scale])
        try:
            width, height = (float(px) for px in attributes["tile_level0_px"])
            mpp = float(attributes["mpp"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error
        parent = None if scale == self.scales[-1] else self.parent(scale)
        return BagScale(scale, mpp, (width, height), self.coords(scale), parent)

    def plan(self) -> BagPlan:
        """Return all but the features."""
        scales = tuple(self.scale_of(name) for name in self.scales)
        return BagPlan(self.attributes, scales, self.shape(self.scales[0])[1], self.dtype)

    def close(self) -> None:
        """Close the file; the next question opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def _opened(self) -> h5py.File:
        if self._file is None:
            if not self.path.is_file():
                raise BagError(f"there is no bag {self.path}. Check the path, or extract the slide.")
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise self._damaged(error) from error
        return self._file

    def _dataset(self, scale: str, name: str) -> h5py.Dataset:
        found = self._opened().get(f"{scale}/{name}")
        if not isinstance(found, h5py.Dataset):
            raise self._damaged(f"{scale}/{name} is missing")
        return found

    def _read(self, scale: str, name: str, rows: Rows | None) -> NDArray[Any]:
        self.shape(scale)
        dataset = self._dataset(scale, name)
        try:
            if rows is None or isinstance(rows, slice):
                return dataset[rows or slice(None)]
            wanted, back = np.unique(np.asarray(rows), return_inverse=True)  # HDF5 wants ascending rows
            return dataset[wanted][back] if len(wanted) else dataset[:0]
        except OSError as error:  # a checksum that does not fit
            raise self._damaged(error) from error

    def _damaged(self, why: object) -> BagError:
        return BagError(f"{self.path} must be a whole bag; it is damaged ({why}). Remove it and run the command again.")


def _attributes(node: Any) -> dict[str, Any]:
    return dict(node.attrs)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def is_finished(path: Path, plan: BagPlan) -> bool:
    """Say whether the bag of this plan is there and whole; an absent or damaged one is False: it is to be made.

    Raises: BagMismatchError if it was made with other settings, naming them, or by another release.
    """
    if not path.exists():
        return False
    try:
        with BagFile(path) as bag:
            found = bag.plan()
    except BagMismatchError:
        raise
    except BagError:
        return False
    differing = list(differences(found, plan))
    if differing:
        raise BagMismatchError(
            f"{path} was made with other settings: {'; '.join(differing)}. Use another output folder, or remove it."
        )
    return True
