"""Pictures and latents as dask arrays: what plain readers give, bit by bit, wherever and whenever it is computed."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import PIL.Image
import pytest
import tifffile

import engine
from engine.core.errors import CanvasError, ConfigError, EngineError, SlideError
from engine.core.lazy import KEPT_OPEN, opened
from engine.images.ome_zarr import Image
from engine.images.tiff import write_tiff
from engine.slides.slide import open_slide
from tests.support.known_picture import HEIGHT, PIXELS, WIDTH, image_of
from tests.support.tiny_run import store_inputs
from tests.support.written_slides import overwrite

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OME-Zarr of this engine, and the same as a pyramidal TIFF."""
    path = tmp_path_factory.mktemp("pictures") / "image.ome.zarr"
    write_tiff(path.with_name("image.tiff"), image_of(path))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> "engine.Run":
    """A finished run of two levels, 1 x 2 tiles of a random model."""
    folder = tmp_path_factory.mktemp("run")
    inputs = store_inputs(folder, 2, 2)
    config = engine.load_config(
        canvas={"height": 300, "width": 420, "levels": ["10x", "20x"]},
        sampling={"stride": 500, "batch_size": 3},
        decode={"tile_stride": 48, "batch_size": 2},
        model={"source": str(inputs["model.source"]), "device": "cpu"},
        embeddings=str(inputs["embeddings"]),
        output={"folder": str(folder / "run"), "formats": []},
    )
    return engine.generate(config, backend="local", progress=False)


def is_multiscale(levels: list[da.Array]) -> bool:
    """Say what napari asks of a list of levels: arrays of one kind and of falling shapes, each half the one before."""
    halves = [
        all(abs(2 * small - large) <= 1 for small, large in zip(b.shape[1:], a.shape[1:], strict=True))
        for a, b in zip(levels, levels[1:], strict=False)
    ]
    return all(halves) and len({(a.ndim, a.dtype, a.shape[0]) for a in levels}) == 1


@pytest.mark.parametrize("name", ["image.ome.zarr", "image.tiff"])
def test_levels_are_those_of_the_plain_readers(picture: Path, name: str) -> None:
    found, plain = engine.open_picture(picture.with_name(name), chunks=700), Image.open(picture)
    assert (found.mpp, found.axes, len(found.levels)) == (0.5, ("c", "y", "x"), 3)
    assert is_multiscale(found.levels)
    assert not is_multiscale(found.levels[::2])
    for number, (level, (height, _)) in enumerate(zip(found.levels, plain.sizes, strict=True)):
        np.testing.assert_array_equal(level.compute(), plain.read(0, height, level=number))
    np.testing.assert_array_equal(found.levels[0][1, 650:750:2, ::-1], PIXELS[1, 650:750:2, ::-1])


def test_names_are_those_of_what_is_read(picture: Path) -> None:
    again = [engine.open_picture(picture).levels[0].name for _ in range(2)]
    assert again[0] == again[1]
    others = [engine.open_picture(picture, chunks=512).levels[0].name, engine.open_picture(picture).levels[1].name]
    before = (picture / "zarr.json").stat()
    os.utime(picture / "zarr.json", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert len({again[0], *others, engine.open_picture(picture).levels[0].name}) == 4


def test_arrays_travel_and_open_files_where_they_are_computed(picture: Path, tmp_path: Path) -> None:
    level = engine.open_picture(picture, chunks=512).levels[0]
    sent = pickle.dumps(level[:, 500:600, 100:200])
    assert len(sent) < 100_000
    (tmp_path / "sent").write_bytes(sent)
    code = """import pickle, sys, engine
print(pickle.load(open(sys.argv[1], "rb")).astype("i8").sum().compute())
print(engine.open_picture(sys.argv[2], chunks=512).levels[0].name)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "sent"), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    total = PIXELS[:, 500:600, 100:200].astype(np.int64).sum()
    assert done.stdout.split() == [str(total), level.name], done.stderr


def test_handles_are_opened_once_and_the_oldest_is_let_go() -> None:
    made: list[int] = []
    for number in (*range(KEPT_OPEN), 0, KEPT_OPEN, 1, 0):
        opened(("test", number), lambda number=number: made.append(number) or number)
    assert made == [*range(KEPT_OPEN + 1), 1]  # 1 was the least used when one more came


def test_a_lost_chunk_stops(tmp_path: Path) -> None:
    image_of(tmp_path / "a.ome.zarr")
    (tmp_path / "a.ome.zarr" / "0" / "c" / "0" / "1" / "0").unlink()
    level = engine.open_picture(tmp_path / "a.ome.zarr", chunks=512).levels[0]
    np.testing.assert_array_equal(level[:, :512], PIXELS[:, :512])
    with pytest.raises(CanvasError, match="is missing"):
        level[:, 512:520].compute()


def test_damage_stops_unless_it_is_asked_for_as_grey(picture: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(picture.with_name("image.tiff").read_bytes())
    with tifffile.TiffFile(path) as tiff:
        overwrite(path, tiff.pages.first.dataoffsets[0], bytes(40))
    with open_slide(path) as slide:
        plain = slide.window(0, 0, 0, HEIGHT, WIDTH)
        assert plain.damaged
        with pytest.raises(SlideError, match="cannot be decoded"):
            slide.dask_levels()[0].compute()
        grey = slide.dask_levels(damaged="grey")[0].compute()
    np.testing.assert_array_equal(grey.transpose(1, 2, 0), plain.pixels)


def test_a_slide_at_a_scale_is_what_read_gives(picture: Path) -> None:
    with open_slide(picture.with_name("image.tiff")) as slide:
        for mpp in (0.5, 1.0, 1.3):
            found = slide.dask(mpp, chunks=256)
            height, width = found.shape[1:]
            assert abs(height - HEIGHT * 0.5 / mpp) < 1
            step = slide.field(1, mpp)[0]
            part = slide.read(256 * step, 0, min(256, width - 256), 256, mpp)
            np.testing.assert_array_equal(found[:, :256, 256:512], part.pixels.transpose(2, 0, 1))
        with pytest.raises(EngineError, match="positive"):
            slide.dask(0)
        with pytest.raises(ConfigError, match="chunks"):
            slide.dask(chunks=0)
        with pytest.raises(ValueError, match="must lie in"):
            slide.window(0, 0, 0, HEIGHT + 1, 3)


def test_pictures_without_a_scale_are_asked_for_one(tmp_path: Path) -> None:
    PIL.Image.fromarray(PIXELS.transpose(1, 2, 0)).save(tmp_path / "a.png")
    with pytest.raises(SlideError, match="µm/px"):
        engine.open_picture(tmp_path / "a.png")
    found = engine.open_picture(tmp_path / "a.png", mpp=0.7)
    assert found.mpp == pytest.approx(0.7)
    np.testing.assert_array_equal(found.levels[0], PIXELS)


def test_a_run_is_opened_and_decoded_bit_by_bit(run: "engine.Run") -> None:
    written = run.image.read(0, 300)
    opened_run = engine.open_picture(run.folder)
    np.testing.assert_array_equal(opened_run.levels[0], written)
    assert opened_run.mpp == run.image.mpp_um
    assert run.thumbnail(64).shape == (46, 64, 3)
    np.testing.assert_array_equal(run.dask(region=(37, 120, 301, 99), chunks=200), written[:, 120:219, 37:338])
    np.testing.assert_array_equal(run.dask(region=(390, 0, 30, 300)), written[:, :, 390:])
    assert run.guide is not None
    np.testing.assert_array_equal(run.dask("10x", chunks=200), run.guide.transpose(2, 0, 1))
    with pytest.raises(ConfigError, match="must lie inside"):
        run.dask(region=(0, 0, 421, 1))
    with pytest.raises(ConfigError, match="10x, 20x"):
        run.dask("5x")


def test_latents_are_the_canvas(run: "engine.Run") -> None:
    from engine.canvas.view import CanvasView

    view = CanvasView(run.folder)
    latents = run.latents(chunks=40)
    assert (latents.shape, latents.dtype) == ((3, 75, 105), np.float32)
    np.testing.assert_array_equal(latents, view.read("20x", 0, 75))
    np.testing.assert_array_equal(run.x0("10x"), view.read("10x", 0, 64))
    assert run.x0().name == run.latents().name
    with pytest.raises(ConfigError, match="got '40x'"):
        run.latents("40x")


def test_a_region_has_latents_and_a_picture_but_is_not_decoded_again(run: "engine.Run", tmp_path: Path) -> None:
    region = run.inpaint((0, 0, 60, 60), seed=3, folder=tmp_path / "region", backend="local", progress=False)
    old, new = run.latents().compute(), region.latents(chunks=50).compute()
    assert old.shape == new.shape
    assert (old != new).any()
    np.testing.assert_array_equal(engine.open_picture(region.folder).levels[0], region.image.read(0, 300))
    with pytest.raises(EngineError, match="laid over another run"):
        region.dask()


def test_latents_stop_when_the_run_goes_on(run: "engine.Run", tmp_path: Path) -> None:
    import shutil

    from engine.canvas.canvas import Canvas
    from engine.canvas.run_state import load_state

    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    latents = engine.Run(folder).latents()
    state = load_state(folder / "state.json")
    sizes = {"10x": (64, 64), "20x": (75, 105)}
    keys = {key: value for key, value in state.keys.items() if not key.startswith("plan.levels.")}
    with Canvas.open(folder, keys, sizes) as canvas:
        canvas.write("20x", 0, np.zeros((3, 75, 105), np.float32))
        canvas.commit(state.progress.pass_index, state.progress.steps - 1)
    with pytest.raises(CanvasError, match="must stand still"):
        latents.compute()
    assert not engine.Run(folder).latents().compute().any()
    with pytest.raises(EngineError, match="keeps none of it"):
        engine.Run(folder).x0()
    with pytest.raises(EngineError, match="must be a finished run"):
        engine.Run(folder).dask()


@pytest.mark.skipif(importlib.util.find_spec("spatialdata") is None, reason="spatialdata is not installed")
def test_spatialdata_takes_a_level(picture: Path) -> None:
    from spatialdata.models import Image2DModel  # type: ignore[import-not-found]

    found = engine.open_picture(picture)
    parsed = Image2DModel.parse(found.levels[0], dims=found.axes)
    np.testing.assert_array_equal(parsed.data, PIXELS)


@pytest.mark.skipif(importlib.util.find_spec("xarray") is None, reason="xarray is not installed")
def test_xarray_takes_a_level(picture: Path) -> None:
    import xarray  # type: ignore[import-not-found]

    found = engine.open_picture(picture)
    array = xarray.DataArray(found.levels[0], dims=found.axes)
    np.testing.assert_array_equal(array.isel(y=slice(5, 9)), PIXELS[:, 5:9])
