"""The picture or stored grid a run is conditioned on → one SSL vector per base cell: float32 (D, h, w).

Invariant: what is read is what the file says; another kind of picture, a hole or a wrong size is an error, never a
conversion. The one exception is `cover_canvas`, which says what it does. It does not know models; encoders come in.
Cells are 256×256 px of the base magnification (20x = 0.5 µm/px), row by row.
"""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import tifffile
import torch
import zarr
from numpy.typing import NDArray
from PIL import Image, ImageOps

from engine.core.errors import UNREADABLE, CheckpointError, SlideError
from engine.core.units import TILE_PX
from engine.model.encoders.base import SSLEncoder
from engine.sampling.ssl_grid import extend_grid
from engine.slides.backends.tiff import open_tiff
from engine.slides.backends.tiff_pictures import choose_series
from engine.slides.samples.cut_streams import strict_jpeg

MAX_PX = 2**29
"""Largest reference in px (23170²): 1.6 GB as an array, twice that while Pillow decodes it."""
_PILLOW_SUFFIXES, _TIFF_SUFFIXES = (".png", ".jpg", ".jpeg"), (".tif", ".tiff")
_GRID_SUFFIXES = (".npy", ".h5", ".hdf5", ".zarr")
_FORM = "an 8-bit RGB picture"
_ADVICE = f"Save it as {_FORM}: PNG, JPEG or TIFF"
_MODES = {
    "1": "black and white",
    "L": "greyscale",
    "LA": "greyscale with transparency",
    "P": "a colour palette",
    "RGBA": "RGB with transparency",
    "CMYK": "CMYK",
}
_PILLOW_LIMIT = threading.Lock()
_ORIENTATION = 0x0112
"""EXIF's tag of how the camera was held."""
log = logging.getLogger(__name__)


def read_reference(path: str | Path, what: str = "reference", smallest: int = TILE_PX) -> NDArray[np.uint8]:
    """Read a PNG, JPEG or TIFF as uint8 (H, W, 3); `what` it is to the user is said in messages.

    A photo's EXIF orientation is applied, as viewers do; of a pyramidal TIFF the largest level is read. A TIFF that
    holds several pictures gives its largest that is no label, macro or overview, and says so; another one is named by
    its number after a colon: "slide.ome.tiff:1". TIFF's YCbCr becomes RGB; colour profiles are ignored. Raises:
    ValueError for a file that is missing, damaged anywhere, not 8-bit RGB, with a side below `smallest` px (unless
    said, one cell) or larger than MAX_PX.
    """
    numbered = re.fullmatch(r"(?i)(.*\.tiff?):(\d+)", str(path))
    path, series = (Path(numbered[1]), int(numbered[2])) if numbered else (Path(path), None)
    suffix = path.suffix.lower()
    if suffix not in _PILLOW_SUFFIXES + _TIFF_SUFFIXES:
        raise ValueError(f"the {what} must be a PNG, JPEG or TIFF file; got {path}. {_ADVICE}.")
    if not path.is_file():
        raise ValueError(f"the {what} must be an existing file; there is none at {path}. Check the path.")
    try:
        is_tiff = suffix in _TIFF_SUFFIXES
        pixels = _read_tiff(path, smallest, series) if is_tiff else _read_with_pillow(path, smallest)
    except _Refused as refusal:
        raise ValueError(f"the {what} {path} {refusal}") from None
    except SlideError as refusal:
        raise ValueError(f"the {what} {path} must be {_FORM}; {refusal}") from None
    except UNREADABLE as error:
        raise ValueError(f"the {what} {path} must be readable; it is damaged or not {suffix[1:]} ({error}).") from error
    return np.ascontiguousarray(pixels)


class _Refused(Exception):
    """Why a readable picture cannot be a reference; the rest of the sentence after its name."""


def _read_with_pillow(path: Path, smallest: int) -> NDArray[np.uint8]:
    with _without_pillow_limit(), Image.open(path) as image:
        _check_size(image.height, image.width, smallest)
        # Pillow calls a 16-bit RGB PNG "RGB" and halves it on the way in; only the decoder's argument tells.
        deep = image.mode.startswith(("I", "F")) or any("16" in str(tile[3]) for tile in image.tile)
        if deep:
            raise _Refused(f"must be {_FORM}; it has more than 8 bits. {_ADVICE}.")
        if image.mode != "RGB" or "transparency" in image.info:
            kind = _MODES["RGBA"] if image.mode == "RGB" else _MODES.get(image.mode, image.mode)
            raise _Refused(f"must be {_FORM}; it is {kind}. {_ADVICE}.")
        if image.format != "JPEG":
            return np.array(ImageOps.exif_transpose(image))
        # Pillow paints on over a break; the strict decoder reads what Pillow would, and raises there.
        upright = Image.fromarray(strict_jpeg(path.read_bytes()))
        upright.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
        return np.array(ImageOps.exif_transpose(upright))


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lift Pillow's limit, which would warn at 9459² px; _check_size comes before any pixel is decoded.

    It is a module variable, put back so that other code of the process keeps its own.
    """
    with _PILLOW_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _read_tiff(path: Path, smallest: int, number: int | None) -> NDArray[np.uint8]:
    _check_tiff(path, smallest, number)
    levels = open_tiff(path, path.name, number, largest=MAX_PX)
    try:
        window = levels.window(0, 0, 0, *levels.sizes[0])
    finally:
        levels.close()
    if window.damaged or not window.valid.all():
        what = f"{window.damaged} of its tiles or strips cannot be decoded" if window.damaged else "some are missing"
        raise _Refused(f"must hold all of its pixels; {what}. Copy it again.")
    if levels.choice.doubtful:
        log.warning(
            "%s holds several pictures; this one is read: %s. Another one: %s:NUMBER.", path, levels.choice.told, path
        )
    return window.pixels


def _check_tiff(path: Path, smallest: int, number: int | None) -> None:
    """Refuse what the header alone tells. Raises _Refused, SlideError, and what tifffile does."""
    with tifffile.TiffFile(path) as tiff:
        series, _ = choose_series(tiff, path.name, number)
        page = series.keyframe
        kind = tifffile.PHOTOMETRIC(page.photometric).name
        if series.axes not in ("YXS", "SYX") or page.samplesperpixel != 3 or kind not in ("RGB", "YCBCR"):
            raise _Refused(
                f"must be {_FORM}; it has axes {series.axes}, {page.samplesperpixel} samples per px, colours {kind}. "
                f"{_ADVICE}."
            )
        if series.dtype != np.uint8:
            raise _Refused(f"must be {_FORM}; its samples are {series.dtype}. {_ADVICE}.")
        _check_size(page.imagelength, page.imagewidth, smallest)
        # A lost tile would read as black, the lost end of a JPEG strip as grey.
        ends = np.add(page.dataoffsets, page.databytecounts)
        if min(page.databytecounts, default=0) == 0 or ends.max() > tiff.filehandle.size:
            raise _Refused("must hold all of its pixels; tiles are missing or the file is cut off. Copy it again.")


def _check_size(height: int, width: int, smallest: int) -> None:
    if min(height, width) < smallest:
        raise _Refused(
            f"must be at least {smallest}x{smallest} px, one cell; it is {height}x{width}. Take a larger region; "
            "enlarging the picture would change its magnification."
        )
    if height * width > MAX_PX:
        raise _Refused(f"must have at most {MAX_PX} px; it is {height}x{width}. Crop the region to imitate.")


def embedding_grid(image: NDArray[np.uint8], encoder: SSLEncoder, batch_size: int = 16) -> NDArray[np.float32]:
    """Encode every base cell of a picture: uint8 (H, W, 3) → float32 (D, ceil(H/256), ceil(W/256)).

    Where 256 does not divide a side, the last row or column of cells is read shifted inward, whole and overlapping
    its neighbour, so that the picture is covered and nothing is invented.
    Raises: ValueError for another array or one smaller than a cell; CheckpointError if the encoder returns NaN.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < TILE_PX:
        raise ValueError(
            f"a picture to encode must be uint8 (H, W, 3) of at least {TILE_PX}x{TILE_PX} px; got {image.dtype} "
            f"{image.shape}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    corners = [(y, x) for y in _cell_starts(image.shape[0]) for x in _cell_starts(image.shape[1])]
    vectors = []
    for first in range(0, len(corners), batch_size):
        cells = [image[y : y + TILE_PX, x : x + TILE_PX] for y, x in corners[first : first + batch_size]]
        batch = torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2).contiguous()
        vectors.append(encoder.encode(batch).numpy())
    rows, columns = len(_cell_starts(image.shape[0])), len(_cell_starts(image.shape[1]))
    grid = np.concatenate(vectors).T.reshape(encoder.dim, rows, columns)
    if not np.isfinite(grid).all():
        raise CheckpointError(
            f"the SSL encoder {encoder.id!r} must return finite vectors; it returned NaN or infinity. Its weights are "
            "damaged or its dtype is too narrow; fetch them again or use float32."
        )
    return np.ascontiguousarray(grid, dtype=np.float32)


def _cell_starts(size: int) -> list[int]:
    """Return the first px of each cell along a side of at least one cell."""
    return [min(start, size - TILE_PX) for start in range(0, size, TILE_PX)]


def read_embeddings(path: str | Path, cells: tuple[int, int] | None = None) -> NDArray[np.float32]:
    """Read a stored grid of SSL vectors as float32 (D, h, w).

    The file is .npy, .h5 or .zarr and holds float (D, h, w), or (h·w, D) row by row with `cells` = (h, w) given.
    Of a file with several arrays one is named after a colon: "slide.h5:features".
    Raises: ValueError for a file that is missing, damaged, ambiguous, of another shape or dtype, or with a vector
    that is not finite or the same in every channel (such as zeros for a cell that was never encoded).
    """
    parts = re.fullmatch(r"(?i)(.*\.(?:npy|h5|hdf5|zarr))/?(?::(.+))?", str(path))
    if parts is None:
        raise ValueError(f"embeddings must be a file of type {', '.join(_GRID_SUFFIXES)}; got {path}. Convert it.")
    file, key = Path(parts[1]), parts[2]
    if not file.exists():
        raise ValueError(f"embeddings must be an existing file; there is none at {file}. Check the path.")
    if file.suffix.lower() == ".npy" and key is not None:
        raise ValueError(f"a .npy file holds one array without a name; got {path}. Leave out ':{key}'.")
    readers = {".npy": _read_npy, ".zarr": _read_zarr}
    try:
        array = readers.get(file.suffix.lower(), _read_h5)(file, key)
    except _Refused as refusal:
        raise ValueError(f"embeddings {file} {refusal}") from None
    except UNREADABLE as error:
        raise ValueError(f"embeddings {file} must be readable; it is damaged or of another type ({error}).") from error
    return _as_grid(array, cells, str(path))


def _read_npy(file: Path, _: str | None) -> NDArray:
    with file.open("rb") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _read_h5(file: Path, key: str | None) -> NDArray:
    with h5py.File(file, "r") as store:
        names: list[str] = []
        store.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        return np.asarray(store[_choose(names, key, file)])


def _read_zarr(file: Path, key: str | None) -> NDArray:
    node = zarr.open(file, mode="r")
    if isinstance(node, zarr.Array):
        if key is not None:
            raise _Refused(f"is one array without a name; got ':{key}'. Leave it out.")
        return np.asarray(node[...])
    arrays = {name: item for name, item in node.members(max_depth=None) if isinstance(item, zarr.Array)}
    return np.asarray(arrays[_choose(list(arrays), key, file)][...])


def _choose(names: list[str], key: str | None, file: Path) -> str:
    """Return the one array that is meant."""
    known = ", ".join(sorted(names)) or "none at all"
    if key is not None and key.strip("/") not in names:
        raise _Refused(f"must hold the array {key!r}; it holds {known}. Name one of them: {file.name}:NAME.")
    if key is None and len(names) != 1:
        raise _Refused(f"must hold one array, or one must be named: {file.name}:NAME; it holds {known}.")
    return names[0] if key is None else key.strip("/")


def _as_grid(array: NDArray, cells: tuple[int, int] | None, name: str) -> NDArray[np.float32]:
    """Check an array and bring it into the form (D, h, w)."""
    if array.dtype.kind != "f" or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"embeddings must be floats of shape (D, h, w) or (h*w, D); {name} holds {array.dtype} {array.shape}."
        )
    if array.ndim == 2:
        if cells is None or cells[0] * cells[1] != len(array):
            given = "its h and w are not known" if cells is None else f"{cells[0]}x{cells[1]} cells are needed"
            raise ValueError(
                f"embeddings of shape (h*w, D) must have one row per cell; {name} has {len(array)} rows and {given}. "
                "Store them as (D, h, w), or change the canvas."
            )
        array = array.T.reshape(array.shape[1], *cells)
    grid = np.ascontiguousarray(array, dtype=np.float32)
    bad = ~np.isfinite(grid).all(axis=0) | (np.ptp(grid, axis=0) == 0)
    if bad.any():
        y, x = np.argwhere(bad)[0]
        raise ValueError(
            f"every SSL vector must be finite and vary over its channels; in {name} {bad.sum()} of {bad.size} do not, "
            f"the first at cell (y={y}, x={x}). Encode those cells, background included."
        )
    return grid


def fit_grid(
    grid: NDArray[np.float32], cells_h: int, cells_w: int, expected_dim: int, source_name: str
) -> NDArray[np.float32]:
    """Return the grid if it is (expected_dim, cells_h, cells_w), the size of the canvas in base cells.

    Raises: ValueError naming both sizes and the canvas that would fit.
    """
    _check_dim(grid, expected_dim, source_name)
    h, w = grid.shape[1:]
    if (h, w) != (cells_h, cells_w):
        raise ValueError(
            f"embeddings must have one vector per base cell of the canvas, {cells_h}x{cells_w}; {source_name} has "
            f"{h}x{w}. Set --canvas.height {h * TILE_PX} --canvas.width {w * TILE_PX}, or encode a picture of "
            "the canvas's size."
        )
    return grid


def cover_canvas(
    grid: NDArray[np.float32], cells_h: int, cells_w: int, expected_dim: int, source_name: str
) -> NDArray[np.float32]:
    """Return (D, cells_h, cells_w) of a reference picture's grid, which may be smaller or larger than the canvas.

    Along each axis, a larger grid gives its top or left part, a smaller one is continued by mirroring its cells (the
    edge cell repeated). Compare the shapes to tell the user. Raises: ValueError for another number of channels.
    """
    _check_dim(grid, expected_dim, source_name)
    return np.ascontiguousarray(extend_grid(grid, cells_h, cells_w)[:, :cells_h, :cells_w])


def _check_dim(grid: NDArray[np.float32], expected_dim: int, source_name: str) -> None:
    if grid.ndim != 3 or grid.shape[0] != expected_dim:
        raise ValueError(
            f"the model takes SSL grids ({expected_dim}, h, w); {source_name} is {grid.shape}. Use the SSL "
            "encoder the model was trained with, and put its channels first."
        )
