"""Bags in the layouts of other programs: TRIDENT, CLAM and STAMP, one slide at a time, rows streamed.

Names, dtypes, chunks, attributes and frames are theirs; tiles that could not be read are left out, for none of them
has a word for it. It does not know where runs keep their bags. Files appear whole or not at all.
Source: the readers and writers of TRIDENT 0.3, CLAM (2025-04) and STAMP 2.4.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from engine.core.errors import BagError
from engine.core.files import replacing
from engine.features.bag_reader import BagFile

Layout = Literal["trident", "clam", "stamp"]
STAMP_VERSION = "2.4.0"
"""The release whose layout is written; STAMP refuses files of a later one than itself."""
_ROWS = 4096
_SCALE_SUFFIX = "x"


def bag_files(out: Path, layout: Layout, bag: BagFile, scale: str) -> list[Path]:
    """Return the files of one slide in a layout."""
    slide, encoder = bag.attributes.slide, bag.attributes.encoder
    if layout == "trident":
        folder = out / trident_folder(bag, scale)
        return [folder / "patches" / f"{slide}_patches.h5", folder / f"features_{encoder}" / f"{slide}.h5"]
    if layout == "clam":
        return [out / "patches" / f"{slide}.h5", out / "h5_files" / f"{slide}.h5", out / "pt_files" / f"{slide}.pt"]
    return [out / encoder / f"{slide}.h5"]


def write_layout(out: Path, layout: Layout, bag: BagFile, scale: str) -> list[Path]:
    """Write one slide in a layout; return its files. Raises: BagError for what it cannot hold; CanvasError."""
    files = bag_files(out, layout, bag, scale)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    {"trident": _write_trident, "clam": _write_clam, "stamp": _write_stamp}[layout](files, bag, scale)
    return files


def trident_folder(bag: BagFile, scale: str) -> str:
    """Return TRIDENT's folder for a tiling: magnification, tile size and overlap in px."""
    return f"{scale}_{bag.attributes.tile_px}px_0px_overlap"


def _write_trident(files: list[Path], bag: BagFile, scale: str) -> None:
    tile, level0 = bag.attributes.tile_px, _level0_px(bag, scale)
    target = _number(float(scale.removesuffix(_SCALE_SUFFIX)))
    common = {"name": bag.attributes.slide}
    about = {
        "patch_size": tile,
        "patch_size_level0": _number(level0),
        # Not the scanner's nominal power: readers get the field of view from this ratio.
        "level0_magnification": _number(float(target) * level0 / tile),
        "target_magnification": target,
        "overlap": 0,
        **common,
        "savetodir": str(files[0].parent.parent),
        "level0_width": bag.attributes.level0_width,
        "level0_height": bag.attributes.level0_height,
    }
    rows = _valid_rows(bag, scale)
    for file, with_features in zip(files, (False, True), strict=True):
        with replacing(file) as partial, h5py.File(partial, "w") as store:
            if with_features:
                features = _dataset(store, "features", len(rows), bag.shape(scale)[1], bag.dtype, 1)
                _set(features, {**common, "savetodir": str(file.parent), "encoder": bag.attributes.encoder})
                for start, part in _features(bag, scale, rows):
                    features[start : start + len(part)] = part
            coords = _dataset(store, "coords", len(rows), 2, "int64", 1)
            coords[:] = bag.coords(scale)[rows]
            _set(coords, about)


def _write_clam(files: list[Path], bag: BagFile, scale: str) -> None:
    rows = _valid_rows(bag, scale)
    xy = bag.coords(scale)[rows]
    if len(xy) and np.abs(xy).max() > np.iinfo(np.int32).max:
        raise BagError(f"CLAM holds coordinates as int32; {bag.path} has larger ones. Use another layout.")
    size = [bag.attributes.level0_width, bag.attributes.level0_height]
    with replacing(files[0]) as partial, h5py.File(partial, "w") as store:
        coords = _dataset(store, "coords", len(rows), 2, "int64", 1)
        coords[:] = xy
        about = {
            "patch_size": round(_level0_px(bag, scale)),  # px of level 0, because patch_level is 0
            "patch_level": 0,
            "downsample": (1.0, 1.0),
            "downsampled_level_dim": size,
            "level_dim": size,
            "name": bag.attributes.slide,
            "save_path": str(files[0].parent),
        }
        _set(coords, about)
    vectors = np.empty((len(rows), bag.shape(scale)[1]), np.float32)
    with replacing(files[1]) as partial, h5py.File(partial, "w") as store:
        features = _dataset(store, "features", *vectors.shape, "float32", 32)
        for start, part in _features(bag, scale, rows):
            features[start : start + len(part)] = vectors[start : start + len(part)] = part
        _dataset(store, "coords", len(rows), 2, "int32", 32)[:] = xy.astype(np.int32)
    with replacing(files[2]) as partial:
        torch.save(torch.from_numpy(vectors), partial)


def _write_stamp(files: list[Path], bag: BagFile, scale: str) -> None:
    rows, about = _valid_rows(bag, scale), bag.attributes
    mpp = bag.scale_of(scale).mpp
    with replacing(files[0]) as partial, h5py.File(partial, "w") as store:
        features = store.create_dataset("feats", (len(rows), bag.shape(scale)[1]), "float16")
        for start, part in _features(bag, scale, rows):
            with np.errstate(over="ignore"):  # found as infinite below
                half = part.astype(np.float16)
            if not np.isfinite(half).all():
                raise BagError(
                    f"STAMP holds features as float16, up to 65504; {bag.path} has larger ones. Use another layout."
                )
            features[start : start + len(half)] = half
        microns = bag.coords(scale)[rows] * np.array([about.mpp_x, about.mpp_y])
        store.create_dataset("coords", data=microns.astype(np.float32))
        values = {
            "stamp_version": STAMP_VERSION,
            "extractor": about.encoder,
            "unit": "um",
            "tile_size_um": about.tile_px * mpp,
            "tile_size_px": about.tile_px,
            "code_hash": f"zoomldm-engine-{about.code_version}",
            "feat_type": "tile",
        }
        _set(store, values)


def _dataset(store: h5py.File, name: str, rows: int, width: int, dtype: str, chunk: int) -> Any:
    return store.create_dataset(name, (rows, width), dtype, maxshape=(None, width), chunks=(chunk, width))


def _set(node: Any, values: dict[str, object]) -> None:
    for name, value in values.items():
        node.attrs[name] = value


def _valid_rows(bag: BagFile, scale: str) -> NDArray[np.int64]:
    return np.flatnonzero(bag.valid(scale))


def _features(bag: BagFile, scale: str, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield the valid features in parts with the row each part starts at."""
    for start in range(0, len(rows), _ROWS):
        yield start, bag.features(scale, rows[start : start + _ROWS])


def _level0_px(bag: BagFile, scale: str) -> float:
    """Return a tile's side in level-0 px: the layouts have one number, so the mean where pixels are not square."""
    width, height = bag.scale_of(scale).tile_level0_px
    return (width + height) / 2


def _number(value: float) -> int | float:
    """Return an int when exact: readers take both, and 512 says more than 512.0."""
    return int(value) if value == int(value) else value
