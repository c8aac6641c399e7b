"""Feature files as they are: our bags, TRIDENT, CLAM (.h5 and .pt) and STAMP, behind one small interface.

Nothing is converted, and only shapes are read until asked for. It does not know labels, patients or models.
Sources: engine/bags.py; TRIDENT 0.3, CLAM 2025-04 and STAMP 2.4 as their writers lay files out.

A file that does not say its magnification (CLAM, STAMP) has the scale UNKNOWN, which stands for whichever single scale
is asked for. Coordinates are x, y of a tile's top left in level-0 px; STAMP's, in µm, cannot be drawn and are refused.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from engine.bags import BagFile
from engine.errors import BagError

UNKNOWN = "unknown"


class FeatureFile(Protocol):
    """The features of one slide, lazily."""

    path: Path
    slide: str
    scales: tuple[str, ...]
    """Fine to coarse."""
    encoder: str
    """Name of the encoder and what else decides the meaning of a feature; "" when the file does not say."""
    synthetic: bool

    def shape(self, scale: str) -> tuple[int, int]: ...
    def features(self, scale: str) -> NDArray[Any]: ...
    def valid(self, scale: str) -> NDArray[np.bool_]: ...
    def parent(self, scale: str) -> NDArray[np.int64]: ...
    def coords(self, scale: str) -> NDArray[np.int64] | None: ...
    def tile_level0_px(self, scale: str) -> tuple[float, float] | None: ...
    def level0_size(self) -> tuple[int, int] | None: ...
    def close(self) -> None: ...


class OurFile:
    """A bag written by the engine."""

    def __init__(self, path: Path) -> None:
        self._bag = BagFile(path)
        about = self._bag.attributes
        self.path, self.slide, self.scales, self.synthetic = path, about.slide, self._bag.scales, about.synthetic
        details = (about.block, about.timestep, about.condition)
        settings = "".join(f" {value}" for value in details if value is not None)
        self.encoder = f"{about.encoder}{settings} sha256:{about.weights_sha256[:16]}"
        if about.slide != path.stem:
            raise BagError(f"{path} must be named after its slide; the file says {about.slide}. Rename it.")
        self.shape, self.features, self.valid = self._bag.shape, self._bag.features, self._bag.valid
        self.parent, self.coords, self.close = self._bag.parent, self._bag.coords, self._bag.close

    def tile_level0_px(self, scale: str) -> tuple[float, float]:
        return self._bag.scale_of(scale).tile_level0_px

    def level0_size(self) -> tuple[int, int]:
        return self._bag.attributes.level0_width, self._bag.attributes.level0_height


class ForeignFile:
    """One scale in the layout of TRIDENT, CLAM or STAMP."""

    synthetic = False

    def __init__(self, path: Path) -> None:
        self.path, self.slide = path, path.stem
        self._file: h5py.File | None = None
        self._name = "feats" if "feats" in self._opened() else "features"
        features = self._opened()[self._name]
        if not isinstance(features, h5py.Dataset) or features.ndim not in (2, 3):
            raise self._foreign(f"{self._name} is no table of one row per tile")
        coords = self._opened().get("coords")
        self._coords = coords.attrs if isinstance(coords, h5py.Dataset) else {}
        magnification = self._coords.get("target_magnification")
        self.scales = (UNKNOWN if magnification is None else f"{float(magnification):g}x",)
        name = features.attrs.get("encoder", self._opened().attrs.get("extractor", ""))
        self.encoder = str(name)
        self._unit = str(self._opened().attrs.get("unit", "px"))

    def shape(self, scale: str) -> tuple[int, int]:
        self._check(scale)
        shape = self._opened()[self._name].shape  # type: ignore[union-attr]
        return shape[-2], shape[-1]

    def features(self, scale: str) -> NDArray[Any]:
        self._check(scale)
        return self._read(self._name).reshape(self.shape(scale))

    def valid(self, scale: str) -> NDArray[np.bool_]:
        return np.ones(self.shape(scale)[0], bool)

    def parent(self, scale: str) -> NDArray[np.int64]:
        raise BagError(f"{self.path} has one scale, {scale}, and no parents. Choose one scale with --scales.")

    def coords(self, scale: str) -> NDArray[np.int64] | None:
        self._check(scale)
        if "coords" not in self._opened() or self._unit != "px":
            return None
        return self._read("coords").astype(np.int64)

    def tile_level0_px(self, scale: str) -> tuple[float, float] | None:
        self._check(scale)
        side = self._coords.get("patch_size_level0")
        return None if side is None else (float(side), float(side))

    def level0_size(self) -> tuple[int, int] | None:
        width, height = (self._coords.get(f"level0_{name}") for name in ("width", "height"))
        return None if width is None or height is None else (int(width), int(height))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> h5py.File:
        if self._file is None:
            self._file = h5py.File(self.path, "r")
        return self._file

    def _read(self, name: str) -> NDArray[Any]:
        try:
            return self._opened()[name][()]  # type: ignore[index]
        except OSError as error:
            raise self._foreign(f"it is damaged ({error})") from error

    def _check(self, scale: str) -> None:
        _check_scale(self, scale)

    def _foreign(self, why: str) -> BagError:
        return BagError(f"{self.path} must be a features file of TRIDENT, CLAM or STAMP; {why}. Remove it.")


class TensorFile:
    """CLAM's pt_files: a bare (N, D) tensor, memory-mapped; it has neither coordinates nor attributes."""

    scales: tuple[str, ...] = (UNKNOWN,)
    encoder: str = ""
    synthetic = False

    def __init__(self, path: Path) -> None:
        self.path, self.slide = path, path.stem
        try:
            tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise BagError(
                f"{path} must be one tensor as CLAM saves it; reading failed ({error}). Remove it."
            ) from error
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
            raise BagError(f"{path} must be one tensor (N, D); got {type(tensor).__name__}. Remove it.")
        self._tensor = tensor

    def shape(self, scale: str) -> tuple[int, int]:
        _check_scale(self, scale)
        return self._tensor.shape[0], self._tensor.shape[1]

    def features(self, scale: str) -> NDArray[Any]:
        _check_scale(self, scale)
        return self._tensor.numpy()

    def valid(self, scale: str) -> NDArray[np.bool_]:
        return np.ones(self.shape(scale)[0], bool)

    def parent(self, scale: str) -> NDArray[np.int64]:
        raise BagError(f"{self.path} has one scale and no parents. Choose one scale with --scales.")

    def coords(self, scale: str) -> None:
        return None

    def tile_level0_px(self, scale: str) -> None:
        return None

    def level0_size(self) -> None:
        return None

    def close(self) -> None:
        return None


def _check_scale(file: FeatureFile, scale: str) -> None:
    if scale not in file.scales and file.scales != (UNKNOWN,):
        raise BagError(f"{file.path} holds {', '.join(file.scales)}; got {scale!r}. Choose one of them with --scales.")


def open_features(path: Path) -> FeatureFile:
    """Open one file, whatever tool wrote it. Raises BagError for one of none of them."""
    if path.suffix == ".pt":
        return TensorFile(path)
    try:
        with h5py.File(path, "r") as file:
            ours, foreign = "bag_version" in file.attrs, "features" in file or "feats" in file
    except OSError as error:
        raise BagError(f"{path} must be a features file; it cannot be read ({error}). Remove it.") from error
    if ours:
        return OurFile(path)
    if foreign:
        return ForeignFile(path)
    raise BagError(
        f"{path} must hold features as our bags, TRIDENT, CLAM or STAMP do; there is neither `features` nor `feats`. "
        "Name the folder of features, not that of coordinates or slide vectors."
    )


def find_features(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by slide: of the folder itself, of CLAM's h5_files or pt_files, or of TRIDENT's job.

    Raises: BagError when there is no such folder, no file, or more than one candidate.
    """
    if not folder.is_dir():
        raise BagError(f"--features must be a folder of features files (*.h5, *.pt); {folder} is none. Check the path.")
    places = [folder, folder / "h5_files", folder / "pt_files"]
    found = next((files for place in places if (files := _files_in(place))), None)
    if found is not None:
        return found
    jobs = [place for place in sorted(folder.glob("*/features_*")) if _files_in(place)]
    if len(jobs) == 1:
        return _files_in(jobs[0])
    if jobs:
        raise BagError(
            f"{folder} holds features of several kinds: {', '.join(str(j.relative_to(folder)) for j in jobs)}. Name "
            "one of these folders."
        )
    raise BagError(f"{folder} must hold features files (*.h5, *.pt); there are none. Extract the slides first.")


def _files_in(folder: Path) -> dict[str, Path]:
    for pattern in ("*.h5", "*.pt"):
        files = {path.stem: path for path in sorted(folder.glob(pattern)) if path.is_file()}
        if files:
            return files
    return {}


def joined_rows(file: FeatureFile, scales: Sequence[str]) -> list[NDArray[np.int64]]:
    """Return each instance's row in each scale asked for (fine to coarse): a tile of the finest one, then its parents.

    Instances whose tile, or the parent's, could not be read are left out. Raises BagError for parents out of range.
    """
    finest = scales[0]
    rows = [np.arange(file.shape(finest)[0])]
    keep = file.valid(finest)
    at, here = finest, rows[0]
    for wanted in scales[1:]:
        while at != wanted:  # parents name rows of the next coarser scale in the file, which may not be asked for
            here = file.parent(at)[here]
            at = file.scales[file.scales.index(at) + 1]
        if len(here) and not 0 <= here.min() <= here.max() < file.shape(at)[0]:
            raise BagError(f"{file.path}: parents of {finest} must be rows of {at}; they are not. Extract it again.")
        keep = keep & file.valid(at)[here]
        rows.append(here)
    return [r[keep] for r in rows]
