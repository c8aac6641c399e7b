"""Reading references and stored grids: what comes in comes out, and every other file is refused with a way out."""

from collections.abc import Callable
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from torch import Tensor

from engine.conditions import reference
from engine.conditions.reference import cover_canvas, embedding_grid, fit_grid, read_embeddings, read_reference
from engine.core.errors import CheckpointError
from engine.model.encoders.base import SSLEncoder

PICTURE = np.random.default_rng(0).integers(0, 256, (260, 300, 3), dtype=np.uint8)
GRID = np.random.default_rng(1).normal(size=(5, 2, 3)).astype(np.float32)


class Corners:
    """An encoder with a closed-form answer: the first pixel, the mean, and a constant."""

    id, dim, digest = "corners", 3, "0" * 64

    def encode(self, images: Tensor) -> Tensor:
        first = images[:, 0, 0, 0].float()
        return torch.stack([first, images.float().mean(dim=(1, 2, 3)), torch.ones(len(images))], dim=1)


# Pictures


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.tif", "tiled.tiff", "planes.tif"])
def test_lossless_pictures_come_back_exactly(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "planes.tif":
        planes = np.ascontiguousarray(PICTURE.transpose(2, 0, 1))
        tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
    elif path.suffix.startswith(".tif"):
        tifffile.imwrite(path, PICTURE, photometric="rgb", compression="zlib", tile=(128, 128))
    else:
        Image.fromarray(PICTURE).save(path)
    got = read_reference(path)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert np.array_equal(got, PICTURE)


def test_jpeg_comes_back_nearly_and_upright(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (260, 300, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held on its side
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    got = read_reference(tmp_path / "a.jpg")
    assert got.shape == (300, 260, 3)
    assert abs(got[:, 100, 0].astype(int) - ramp[0, :, 0]).max() <= 3


def test_the_largest_level_of_a_pyramid_is_read(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(PICTURE, photometric="rgb", subifds=1)
        tiff.write(PICTURE[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(read_reference(tmp_path / "a.tif"), PICTURE)


def save_pillow(mode: str) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(PICTURE).convert(mode).save(path)


def save_tiff(pixels: np.ndarray, **options: object) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, pixels, **options)


DEEP = PICTURE.astype(np.uint16) * 257
REFUSED = [
    ("a.png", save_pillow("L"), "greyscale"),
    ("a.png", save_pillow("RGBA"), "RGB with transparency"),
    ("a.png", save_pillow("P"), "palette"),
    ("a.png", save_pillow("1"), "black and white"),
    ("a.png", save_pillow("I;16"), "more than 8 bits"),
    ("a.png", lambda p: p.write_bytes(imagecodecs.png_encode(DEEP)), "more than 8 bits"),
    ("a.png", lambda p: Image.fromarray(PICTURE).save(p, transparency=(0, 0, 0)), "RGB with transparency"),
    ("a.jpg", save_pillow("L"), "greyscale"),
    ("a.jpg", save_pillow("CMYK"), "CMYK"),
    ("a.tif", save_tiff(DEEP, photometric="rgb"), "uint16"),
    ("a.tif", save_tiff(PICTURE[..., 0]), "MINISBLACK"),
    ("a.tif", save_tiff(np.dstack([PICTURE, PICTURE[..., :1]]), photometric="rgb", extrasamples=["unassalpha"]), "4 s"),
    ("a.tif", save_tiff(PICTURE[..., 0], photometric="palette", colormap=np.zeros((3, 256), "u2")), "PALETTE"),
    ("a.tif", save_tiff(np.stack([PICTURE] * 2), photometric="rgb"), "axes QYXS"),
    ("a.png", lambda p: Image.fromarray(PICTURE[:255]).save(p), "at least 256x256 px, one cell; it is 255x300"),
    ("a.tif", save_tiff(PICTURE[:, :100], photometric="rgb"), "it is 260x100"),
    ("a.png", lambda p: p.write_bytes(b"not a picture"), "damaged"),
    ("a.tif", lambda p: p.write_bytes(b"not a picture"), "damaged"),
    ("a.png", lambda p: None, "existing file"),
    ("a.bmp", save_pillow("RGB"), "PNG, JPEG or TIFF"),
]


@pytest.mark.parametrize(("name", "write", "message"), REFUSED, ids=[f"{n} {m}" for n, _, m in REFUSED])
def test_other_pictures_are_refused(tmp_path: Path, name: str, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read_reference(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "zlib.tif", "jpeg.tif"])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_truncated_pictures_are_refused(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if path.suffix == ".tif":
        # In one strip, as a JPEG decoder would fill the lost end with grey.
        tifffile.imwrite(path, PICTURE, photometric="rgb", compression=path.stem, rowsperstrip=260)
    else:
        Image.fromarray(PICTURE).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match="damaged|cut off"):
        read_reference(path)


def test_large_pictures_meet_our_limit_and_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", PICTURE, photometric="rgb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself would warn (an error here) or refuse
    assert read_reference(tmp_path / "a.png").shape == PICTURE.shape
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(reference, "MAX_PX", 260 * 300 - 1)
    for name in ("a.png", "a.tif"):
        with pytest.raises(ValueError, match="at most 77999 px; it is 260x300"):
            read_reference(tmp_path / name)


def test_a_picture_of_4096_px_reads_without_warning(tmp_path: Path) -> None:
    Image.new("RGB", (4096, 4096), (200, 150, 190)).save(tmp_path / "a.jpeg")
    assert read_reference(tmp_path / "a.jpeg").shape == (4096, 4096, 3)


# Picture → grid


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_each_cell_gets_its_own_vector_and_the_rest_shifts_inward(batch_size: int) -> None:
    image = np.zeros((600, 512, 3), np.uint8)
    starts = [(y, x) for y in (0, 256, 600 - 256) for x in (0, 256)]
    for number, (y, x) in enumerate(starts):
        image[y, x] = 10 + number
    encoder: SSLEncoder = Corners()
    grid = embedding_grid(image, encoder, batch_size)
    assert grid.shape == (3, 3, 2)
    assert grid.dtype == np.float32
    assert grid[0].ravel().tolist() == [10, 11, 12, 13, 14, 15]
    assert (grid[2] == 1).all()


def test_a_picture_of_one_cell_is_enough() -> None:
    assert embedding_grid(PICTURE[:256, :256], Corners()).shape == (3, 1, 1)


@pytest.mark.parametrize("image", [PICTURE[:255], PICTURE[..., 0], PICTURE.astype(np.float32), PICTURE[..., :2]])
def test_arrays_that_are_no_picture_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a picture to encode must be uint8"):
        embedding_grid(image, Corners())


def test_an_encoder_that_overflows_is_named() -> None:
    class Overflowing(Corners):
        def encode(self, images: Tensor) -> Tensor:
            return super().encode(images) / torch.tensor([1.0, 0.0, 1.0])

    with pytest.raises(CheckpointError, match="'corners' must return finite"):
        embedding_grid(PICTURE, Overflowing())


# Stored grids


def store(path: Path, array: np.ndarray, name: str = "features") -> str:
    """Write an array; return the name to read it by."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".zarr":
        zarr.create_array(path, data=array)
    else:
        with h5py.File(path, "a") as file:
            file[name] = array
    return str(path)


@pytest.mark.parametrize("name", ["g.npy", "g.h5", "g.hdf5", "g.zarr"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_stored_grids_come_back(tmp_path: Path, name: str, dtype: str) -> None:
    got = read_embeddings(store(tmp_path / name, GRID.astype(dtype)))
    assert got.dtype == np.float32
    assert np.array_equal(got, GRID)


@pytest.mark.parametrize("name", ["g.npy", "g.h5", "g.zarr"])
def test_rows_of_vectors_are_laid_out_row_by_row(tmp_path: Path, name: str) -> None:
    path = store(tmp_path / name, np.stack([GRID[:, y, x] for y in range(2) for x in range(3)]))
    assert np.array_equal(read_embeddings(path, cells=(2, 3)), GRID)
    with pytest.raises(ValueError, match="6 rows and its h and w are not known"):
        read_embeddings(path)
    with pytest.raises(ValueError, match="6 rows and 2x2 cells are needed"):
        read_embeddings(path, cells=(2, 2))


def test_one_of_several_arrays_must_be_named(tmp_path: Path) -> None:
    path = store(tmp_path / "g.h5", GRID, "deep/features")
    assert np.array_equal(read_embeddings(path), GRID)
    store(tmp_path / "g.h5", np.zeros((6, 2)), "coords")
    with pytest.raises(ValueError, match=r"g.h5:NAME; it holds coords, deep/features"):
        read_embeddings(path)
    with pytest.raises(ValueError, match=r"'nothing'; it holds coords"):
        read_embeddings(f"{path}:nothing")
    assert np.array_equal(read_embeddings(f"{path}:deep/features"), GRID)


def test_an_array_inside_a_zarr_group_can_be_named(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    group.create_array("uni", data=GRID)
    group.create_array("dino", data=GRID + 1)
    assert np.array_equal(read_embeddings(f"{tmp_path}/g.zarr:dino"), GRID + 1)
    with pytest.raises(ValueError, match="it holds dino, uni"):
        read_embeddings(tmp_path / "g.zarr")


def changed(value: float, cells: tuple = (slice(None), 1, 2)) -> np.ndarray:
    grid = GRID.copy()
    grid[cells] = value
    return grid


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (changed(np.nan, (0, 1, 2)), r"1 of 6 do not, the first at cell \(y=1, x=2\)"),
        (changed(np.inf, (0, 0, 1)), r"\(y=0, x=1\)"),
        (changed(0), "background included"),
        (GRID.astype(np.int64), "must be floats"),
        (GRID[None], r"\(1, 5, 2, 3\)"),
        (GRID[0, 0], "must be floats"),
        (GRID[:, :0], r"\(5, 0, 3\)"),
    ],
)
def test_unusable_vectors_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_embeddings(store(tmp_path / "g.npy", array))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.npy, \.h5, \.hdf5, \.zarr; got"):
        read_embeddings(tmp_path / "g.pt")
    for name in ("g.npy", "g.h5", "g.zarr"):
        with pytest.raises(ValueError, match="existing file"):
            read_embeddings(tmp_path / name)
    with pytest.raises(ValueError, match="without a name"):
        read_embeddings(store(tmp_path / "g.npy", GRID) + ":a")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    (tmp_path / "broken.h5").write_bytes(b"\x89HDF")
    (tmp_path / "broken.zarr").mkdir()
    for name in ("o.npy", "broken.h5", "broken.zarr"):
        with pytest.raises(ValueError, match="must be readable"):
            read_embeddings(tmp_path / name)


# Grid → canvas


def test_stored_grids_must_fit_exactly() -> None:
    assert fit_grid(GRID, 2, 3, 5, "g.npy") is GRID
    for cells in ((1, 3), (2, 2), (4, 4)):
        with pytest.raises(ValueError, match="g.npy has 2x3. Set --canvas.height 512 --canvas.width 768"):
            fit_grid(GRID, *cells, 5, "g.npy")
    for fit in (fit_grid, cover_canvas):
        with pytest.raises(ValueError, match=r"takes SSL grids \(1024, h, w\); g.npy is \(5, 2, 3\)"):
            fit(GRID, 2, 3, 1024, "g.npy")


def test_a_larger_reference_gives_its_top_left() -> None:
    assert np.array_equal(cover_canvas(GRID, 1, 2, 5, "a.png"), GRID[:, :1, :2])


def test_a_smaller_reference_is_mirrored() -> None:
    covered = cover_canvas(GRID, 5, 2, 5, "a.png")
    assert np.array_equal(covered, GRID[:, [0, 1, 1, 0, 0]][:, :, :2])
