"""Feature files as they are: our bags, TRIDENT, CLAM (.h5 and .pt) and STAMP, behind one small interface.

Nothing is converted, and only shapes are read until asked for. It does not know labels, patients or models.
Sources: engine/features/bag_reader.py; TRIDENT 0.3, CLAM 2025-04 and STAMP 2.4 as their writers lay files out.

A file that does not say its magnification (CLAM, STAMP) has the scale UNKNOWN, which stands for whichever single scale
is asked for. Coordinates are x, y of a tile's top left in level-0 px; STAMP's, in µm, cannot be drawn and are refused.
"""

import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.documents.tables import clean
from engine.core.errors import BagError
from engine.features.bag_reader import BagFile

UNKNOWN = "unknown"
_SERIES_IN_SOURCE = re.compile(r", series (\d+)$")
_UNREADABLE = (
    *(RuntimeError, EOFError, OSError, pickle.UnpicklingError, struct.error, ValueError, TypeError, AttributeError),
    *(LookupError, OverflowError, MemoryError, zipfile.BadZipFile),
)
"""What torch.load raises for damaged files: bytes changed and cut at random gave nearly all of these."""


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
    def series(self) -> int | None: ...
    def close(self) -> None: ...


class OurFile:
    """A bag written by the engine."""

    def __init__(self, path: Path) -> None:
        self._bag = BagFile(path)
        about = self._bag.attributes
        self.path, self.slide, self.scales, self.synthetic = path, path.stem, self._bag.scales, about.synthetic
        details = (about.block, about.timestep, about.condition)
        settings = "".join(f" {value}" for value in details if value is not None)
        self.encoder = f"{about.encoder}{settings} sha256:{about.weights_sha256[:16]}"
        if clean(about.slide) != clean(path.stem):  # disks of macOS keep names in another Unicode form
            raise BagError(f"{path} must be named after its slide; the file says {about.slide}. Rename it.")
        self.shape, self.features, self.valid = self._bag.shape, self._bag.features, self._bag.valid
        self.parent, self.coords, self.close = self._bag.parent, self._bag.coords, self._bag.close

    def tile_level0_px(self, scale: str) -> tuple[float, float]:
        return self._bag.scale_of(scale).tile_level0_px

    def level0_size(self) -> tuple[int, int]:
        return self._bag.attributes.level0_width, self._bag.attributes.level0_height

    def series(self) -> int | None:
        about = self._bag.attributes
        said = _SERIES_IN_SOURCE.search(about.mpp_source)  # where earlier bags say it
        return about.series if about.series is not None or said is None else int(said[1])


class ForeignFile:
    """One scale in the layout of TRIDENT, CLAM or STAMP; a file that contradicts itself is refused when opened."""

    synthetic = False

    def __init__(self, path: Path) -> None:
        self.path, self.slide = path, path.stem
        self._file: h5py.File | None = None
        self._name = "feats" if "feats" in self._opened() else "features"
        features = self._opened()[self._name]
        if not isinstance(features, h5py.Dataset):
            raise self._foreign(f"{self._name} is no table of one row per tile")
        try:
            self._dtype, shape = features.dtype, features.shape
        except TypeError as error:  # h5py's word for number types that NumPy lacks
            raise self._foreign(f"{self._name} are of a type that cannot be read ({error})") from error
        self._shape = table_shape(path, self._name, shape)
        _check_numbers(path, self._name, self._dtype)
        coords = self._opened().get("coords")
        self._coords = coords.attrs if isinstance(coords, h5py.Dataset) else {}
        magnification = self._number("target_magnification")
        self.scales = (UNKNOWN if magnification is None else f"{magnification:g}x",)
        name = features.attrs.get("encoder", self._opened().attrs.get("extractor", ""))
        self.encoder = name.decode() if isinstance(name, bytes) else str(name)
        self._unit = str(self._opened().attrs.get("unit", "px"))

    def shape(self, scale: str) -> tuple[int, int]:
        self._check(scale)
        return self._shape

    def features(self, scale: str) -> NDArray[Any]:
        self._check(scale)
        return as_features(self.path, self._read(self._name).reshape(self._shape))

    def valid(self, scale: str) -> NDArray[np.bool_]:
        return np.ones(self.shape(scale)[0], bool)

    def parent(self, scale: str) -> NDArray[np.int64]:
        raise BagError(f"{self.path} has one scale, {scale}, and no parents. Choose one scale with --scales.")

    def coords(self, scale: str) -> NDArray[np.int64] | None:
        """Return x, y of each tile; None where they are not two numbers in px. Raises BagError for other rows."""
        self._check(scale)
        if not isinstance(self._opened().get("coords"), h5py.Dataset):
            return None
        coords = self._read("coords")
        coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
        if len(coords) != self._shape[0]:
            raise self._foreign(f"coords has {len(coords)} rows for {self._shape[0]} tiles")
        if self._unit != "px" or coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iuf":
            return None
        if not np.isfinite(coords).all():
            raise self._foreign("coords has values that are no numbers")
        return coords.astype(np.int64)

    def tile_level0_px(self, scale: str) -> tuple[float, float] | None:
        self._check(scale)
        side = self._number("patch_size_level0")
        return None if side is None else (side, side)

    def level0_size(self) -> tuple[int, int] | None:
        width, height = (self._number(f"level0_{name}") for name in ("width", "height"))
        return None if width is None or height is None else (int(width), int(height))

    def series(self) -> None:
        return None

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
        except (OSError, TypeError) as error:  # damage, a compression without its plugin, a type NumPy lacks
            raise self._foreign(f"{name} cannot be read ({error})") from error

    def _number(self, name: str) -> float | None:
        """Return an attribute of the coordinates as a number: written as one, as a text such as 20x, or as [20]."""
        value = self._coords.get(name)
        if value is None:
            return None
        text = value.decode() if isinstance(value, bytes) else str(np.ravel(value)[0]) if np.size(value) == 1 else ""
        try:
            return float(text.lower().removesuffix("x"))
        except ValueError as error:
            raise self._foreign(f"the attribute {name} is {value!r}, no number") from error

    def _check(self, scale: str) -> None:
        _check_scale(self, scale)

    def _foreign(self, why: str) -> BagError:
        return BagError(
            f"{self.path} must be a features file of TRIDENT, CLAM or STAMP; {why}. Extract it again, or move it away."
        )


class TensorFile:
    """CLAM's pt_files: a tensor with one row per tile, alone or in a dict; it has neither coordinates nor attributes.

    Read with weights_only, so that nothing in it runs. Files of the present form are memory-mapped.
    """

    scales: tuple[str, ...] = (UNKNOWN,)
    encoder: str = ""
    synthetic = False

    def __init__(self, path: Path) -> None:
        self.path, self.slide = path, path.stem
        try:
            # The form before torch 1.6 is no zip archive and cannot be mapped.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except _UNREADABLE as error:
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it holds a {foreign[1]}" if foreign else (str(error) or type(error).__name__).splitlines()[0][:120]
            raise BagError(
                f"{path} must be a tensor that torch.load reads with weights_only=True; it fails: {why}. Save the "
                "features alone, with torch.save(tensor, path), or move the file away."
            ) from error
        if isinstance(found, dict):
            names = [name for name in ("features", "feats") if name in found]
            found = found[names[0]] if names else found
        if not isinstance(found, torch.Tensor) or not _is_plain(found):
            keys = f" with {', '.join(map(str, list(found)[:5]))}" if isinstance(found, dict) else ""
            raise BagError(
                f"{path} must be one dense tensor (N, D), or a dict with one in `features`; got {type(found).__name__}"
                f"{keys}. Save the features alone, with torch.save(tensor, path)."
            )
        self._shape = table_shape(path, "the tensor", tuple(found.shape))
        if found.dtype.is_complex or found.dtype == torch.bool:
            _check_numbers(path, "the tensor", found.dtype)
        self._tensor = found.detach()

    def shape(self, scale: str) -> tuple[int, int]:
        _check_scale(self, scale)
        return self._shape

    def features(self, scale: str) -> NDArray[Any]:
        _check_scale(self, scale)
        tensor = self._tensor
        if tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            tensor = tensor.float()  # NumPy has no bfloat16 or float8
        return as_features(self.path, tensor.reshape(self._shape).numpy())

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

    def series(self) -> None:
        return None

    def close(self) -> None:
        return None


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)


def table_shape(path: Path, name: str, shape: tuple[int, ...] | None) -> tuple[int, int]:
    """Return (N, D) of an array with one row per tile, in which axes of length 1 may be too many: (1, N, D).

    Raises: BagError for one vector, several tables, or what may be one tile or many.
    """
    if shape in ((0,), (0, 0)):  # no tile, and so no width
        return 0, 0
    found = list(shape or ())
    for place in (0, -1):
        while len(found) > 2 and found[place] == 1:
            found.pop(place)
    found = [size for at, size in enumerate(found) if size != 1 or at in (0, len(found) - 1) or len(found) <= 2]
    # (1, D, 1, 1) would come out as D tiles of one feature, so more than two axes never mean that.
    if len(found) != 2 or found[1] < 1 or (found[1] == 1 and len(shape or ()) > 2):
        kind = " (one vector for the whole slide)" if len(shape or ()) == 1 else ""
        raise BagError(
            f"{path} must hold one row of features per tile, (N, D); {name} has the shape {shape}{kind}. Save it as "
            "(N, D), or name the folder of tile features."
        )
    return found[0], found[1]


def _check_numbers(path: Path, name: str, dtype: object) -> None:
    if not isinstance(dtype, np.dtype) or dtype.kind not in "fiu":
        raise BagError(f"{path} must hold real numbers; {name} is {dtype}. Save it as float32 or float16.")


def as_features(path: Path, array: NDArray[Any]) -> NDArray[Any]:
    """Return features as float16 or float32 in this machine's byte order, which is what torch takes.

    Raises: BagError for numbers beyond float32.
    """
    if array.dtype in (np.float16, np.float32):
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore"):
        found = array.astype(np.float32)
    if array.dtype.kind == "f" and (np.isinf(found) & np.isfinite(array)).any():
        raise BagError(f"{path} must hold numbers within float32; some are beyond ±3.4e38. Extract the slide again.")
    return found


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
        # What begins with a dot is no features file: macOS leaves ._SLIDE.h5 on foreign disks.
        paths = [path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.name.startswith(".")]
        if odd := next((path.name for path in paths if not _is_text(path.name)), None):
            raise BagError(
                f"names of features files must be text in the encoding of file names, "
                f"{sys.getfilesystemencoding()}; {folder} has {odd!r}. Rename it, or set PYTHONUTF8=1 if it is UTF-8."
            )
        files = {path.stem: path for path in paths}
        if files:
            return files
    return {}


def _is_text(name: str) -> bool:
    """Say whether Python could decode a file's name; what it could not would end the writing of tables."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


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
