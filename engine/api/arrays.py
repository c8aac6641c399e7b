"""Pictures, latents and x0 as dask arrays: for napari, xarray, spatialdata, and for reductions larger than memory.

Nothing is read before it is computed, and files are opened in the process that computes. Nothing here writes a run.
"""

import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.canvas.run_state import RunState
from engine.canvas.view import CanvasView
from engine.core.errors import CanvasError, ConfigError, EngineError
from engine.core.lazy import CHUNK_PX, file_stamp, lazy_array, opened
from engine.core.runtime import choose_device, keep_freed_memory, pin_arithmetic
from engine.core.streaming import Box
from engine.core.units import LATENT_FACTOR
from engine.generation.finished_run import FinishedRun
from engine.generation.outputs import IMAGE
from engine.generation.preview import check_region, find_picture, same_model
from engine.generation.run import prepare, stored_config
from engine.images.ome_zarr import Image, is_ours
from engine.sampling.denoiser import LocalDenoiser
from engine.sampling.pixels import decode_part, to_uint8
from engine.sampling.plan import Level, Plan, x0_name
from engine.slides.lazy import Damaged
from engine.slides.slide import Slide, open_slide

if TYPE_CHECKING:
    import dask.array as da


@dataclass(frozen=True)
class LazyPicture:
    """A picture whose px are read when they are computed.

    >>> import engine, PIL.Image
    >>> PIL.Image.new("RGB", (96, 64), "white").save("white.png")
    >>> picture = engine.open_picture("white.png", mpp=0.5)
    >>> isinstance(picture, engine.LazyPicture), picture.axes, int(picture.levels[0].min().compute())
    (True, ('c', 'y', 'x'), 255)
    """

    levels: "list[da.Array]"
    """uint8 (3, h, w), finest first; each is reduced from the one before."""
    mpp: float
    """µm/px of the finest level."""
    axes: tuple[str, str, str] = ("c", "y", "x")


def open_picture(
    source: str | Path, *, mpp: float | None = None, chunks: int = CHUNK_PX, damaged: Damaged = "error"
) -> LazyPicture:
    """Open the picture of a run folder, an OME-Zarr, a TIFF, a slide, a PNG or a JPEG as dask arrays.

    `mpp` (µm/px) is for files that state none. `chunks` is the side of a block in px. Raises: EngineError for a run
    that is not decoded; SlideError for a file that is no picture, and, when computed, `damaged` for px that cannot be
    decoded (`damaged="grey"` gives those of slides as 128); CanvasError when a chunk of a run's picture is lost.

    >>> import engine, PIL.Image
    >>> PIL.Image.new("RGB", (96, 64), "white").save("white.png")
    >>> picture = engine.open_picture("white.png", mpp=0.5)
    >>> picture.levels[0].shape, picture.levels[0].dtype, picture.mpp
    ((3, 64, 96), dtype('uint8'), 0.5)
    """
    path = Path(source)
    if (path / "state.json").is_file():
        if find_picture(path) is None:
            raise EngineError(f"{path} has no finished picture yet. Continue the run, or take its latents.")
        return _of_image(path / IMAGE, chunks)
    if is_ours(path):
        return _of_image(path, chunks)
    with open_slide(path, mpp=mpp) as slide:
        return of_slide(slide, chunks, damaged)


def of_slide(slide: Slide, chunks: int = CHUNK_PX, damaged: Damaged = "error") -> LazyPicture:
    """Return the levels of a slide, as they are stored."""
    return LazyPicture(slide.dask_levels(chunks, damaged), slide.resolution.mpp)


def _of_image(path: Path, chunks: int) -> LazyPicture:
    image, stamp = Image.open(path), file_stamp(path)
    levels = [
        lazy_array(_PictureLevel(path.absolute(), stamp, n), (3, *size), np.uint8, ("picture", *stamp, n), chunks)
        for n, size in enumerate(image.sizes)
    ]
    return LazyPicture(levels, image.mpp_um)


@dataclass(frozen=True)
class _PictureLevel:
    path: Path
    stamp: tuple[str, int, int]
    level: int

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.uint8]:
        image = opened(("picture", self.stamp), partial(Image.open, self.path))
        return image.read(y0, y1, x0, x1, self.level)


def committed_latents(folder: Path, level: str | None, chunks: int) -> "da.Array":
    """Return the latents of a level (None: the finest) as they are committed now: float32 (3, h, w), latent px.

    Raises: ConfigError for a level that the run does not sample; EngineError while nothing of it is committed, and for
    a region at work; CanvasError when computed after a further commit of the run, or damaged.
    """
    state, plan = CanvasView(folder).state, _plan_of(folder)
    return _latents(folder, state, _sampled(plan, level), "", chunks)


def predicted_x0(folder: Path, level: str | None, chunks: int) -> "da.Array":
    """Return x0 of a level (None: the finest) at the last commit: float32 (3, h, w), latent px.

    Of a level that is sampled to its end x0 are its latents; of one at work it is what a solver of second order keeps.
    Raises: as `committed_latents`; EngineError for a level at work whose solver keeps no x0.
    """
    state, plan = CanvasView(folder).state, _plan_of(folder)
    found = _sampled(plan, level)
    number, now = plan.levels.index(found), state.progress
    begun = [i for i, p in enumerate(plan.passes) if p.tilings[number] is not None and i <= now.pass_index]
    if begun and (begun[-1] < now.pass_index or now.steps == len(plan.passes[now.pass_index].steps)):
        return _latents(folder, state, found, "", chunks)
    if begun and state.buffers.get(x0_name(found.name)) is not None:
        return _latents(folder, state, found, ".x0", chunks)
    raise EngineError(
        f"x0 of {found.name} must be committed; {folder} is after step {now.steps} of pass {now.pass_index + 1}, and "
        "keeps none of it. Finish the run, or export() the picture that it shows now."
    )


def _plan_of(folder: Path) -> Plan:
    state = CanvasView(folder).state
    root = FinishedRun(folder).root.folder if "redo.parent" in state.keys else folder
    return prepare(stored_config(root)).plan


def _sampled(plan: Plan, name: str | None) -> Level:
    """Return a level by its name. Raises: ConfigError for one that the run does not sample."""
    known = {level.name: level for level in plan.sampled}
    if name is not None and name not in known:
        raise ConfigError(f"level must be one that the run samples, {', '.join(known)}; got {name!r}.")
    return plan.finest if name is None else known[name]


def _latents(folder: Path, state: RunState, level: Level, suffix: str, chunks: int) -> "da.Array":
    name = level.name + suffix
    if "redo.parent" not in state.keys and state.buffers.get(name) is None:
        raise EngineError(f"{folder} must have committed latents of {name}; it has none yet. Wait for its first step.")
    source = _Latents(folder.absolute(), state.digest, state.commits, name)
    said = ("latents", str(folder.resolve()), state.digest, state.commits, name)
    return lazy_array(source, (3, level.height, level.width), np.float32, said, chunks)


@dataclass(frozen=True)
class _Latents:
    folder: Path
    digest: str
    commits: int
    level: str

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.float32]:
        seen = opened(("latents", self.folder, self.digest, self.commits), partial(_Committed, self.folder))
        rows = seen.read(self.level, Box(y0, x0, y1, x1))
        now = seen.view.state
        if seen.view.moved() or (now.digest, now.commits) != (self.digest, self.commits):
            raise CanvasError(
                f"{self.folder} must stand still while its latents are read; it committed a step meanwhile. Ask for "
                "them again, or stop the run first."
            )
        return rows


class _Committed:
    """A run at one commit, open in this process; of a region, its latents over those of the run."""

    def __init__(self, folder: Path) -> None:
        self.view = CanvasView(folder)
        self._region = (FinishedRun(folder), _plan_of(folder)) if "redo.parent" in self.view.state.keys else None

    def read(self, level: str, box: Box) -> NDArray[np.float32]:
        if self._region is not None:
            finished, plan = self._region
            return finished.latents(plan, level, box)
        return self.view.read(level, box.y0, box.y1, box.x0, box.x1)


def decoded_on_demand(
    folder: Path, level: str | None, region: tuple[int, int, int, int] | None, chunks: int
) -> "da.Array":
    """Return the picture of a sampled level (None: the finest), decoded block by block: uint8 (3, h, w).

    `region` is (x, y, width, height) in px of that level; None takes all of it. It is what the run writes, bit by bit,
    on the kind of device and with the threads of the run. Only windows that touch a block are decoded, one block at a
    time in each process. Raises: EngineError unless the run is finished, or where its picture is more than decoded
    latents; ConfigError for a level or region that it has not; when computed, CanvasMismatchError if the weights are
    not the run's.
    """
    finished = FinishedRun(folder)
    config = stored_config(finished.root.folder)
    plan = prepare(config).plan
    found = _sampled(plan, level)
    if found is plan.finest and (finished.parent is not None or (plan.given and config.guidance.method != "none")):
        raise EngineError(
            f"a picture that is decoded again must come from latents alone; that of {folder} is laid over another run "
            "or held to a guide that was given. Use open_picture(), which reads what is written."
        )
    height, width = (
        plan.size_px if found is plan.finest else (found.height * LATENT_FACTOR, found.width * LATENT_FACTOR)
    )
    x, y, w, h = region or (0, 0, width, height)
    try:
        check_region(Box(y, x, y + h, x + w), (height, width))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    source = _Decoded(folder.absolute(), finished.digest, plan.levels.index(found), y, x)
    said = ("decoded", str(folder.resolve()), finished.digest, found.name, region)
    return lazy_array(source, (3, h, w), np.uint8, said, chunks)


@dataclass(frozen=True)
class _Decoded:
    folder: Path
    digest: str
    level: int
    top: int
    left: int

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.uint8]:
        decoder = opened(("decoded", self.folder, self.digest), partial(_Decoder, self.folder))
        return decoder.decode(self.level, Box(self.top + y0, self.left + x0, self.top + y1, self.left + x1))


class _Decoder:
    """A finished run and its model, at work in this process."""

    def __init__(self, folder: Path) -> None:
        self._finished = FinishedRun(folder)
        root = self._finished.root.folder
        self._config = stored_config(root)
        job = prepare(self._config)
        model, _, _ = same_model(root, job)
        device = choose_device(self._config.model.device)
        keep_freed_memory(device)
        self._plan, self._denoiser, self._lock = job.plan, LocalDenoiser(model.to(device)), threading.Lock()

    def decode(self, number: int, part: Box) -> NDArray[np.uint8]:
        """Return a part (px) of a level's picture, (3, h, w)."""
        plan, level = self._plan, self._plan.levels[number]

        def read(box: Box) -> NDArray[np.float32]:
            return self._finished.latents(plan, level.name, box)

        with self._lock:  # blocks come from several threads; each alone uses all that the network may
            pin_arithmetic(self._config.model.threads)  # torch counts threads per thread that calls it
            rows = decode_part(read, plan.decodes[number], part, self._denoiser, self._config.decode.sigma, "dask")
            return np.concatenate([to_uint8(band) for band in rows], axis=1)
