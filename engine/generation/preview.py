"""The picture of a run, finished or at work, whole or a region of it.

A decoded picture is read as it is. Otherwise the latents of one commit are copied, x0 is predicted from them at their
timestep, one network call per tile, and decoded; coarser levels do not steer it, so that colours may differ a little
from what the run will show. The run's lock is left alone and nothing in its folder changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.canvas.canvas import BAND, Canvas
from engine.canvas.run_state import RunState, check_run_keys, load_state
from engine.canvas.view import CanvasView
from engine.conditions.conditions import STORED, Conditions, stored_grid
from engine.core.errors import CanvasError
from engine.core.files import plain
from engine.core.numerics import keyed_noise
from engine.core.progress import Progress
from engine.core.runtime import choose_device, keep_freed_memory, pin_arithmetic
from engine.core.streaming import Box, ForwardReader, ReadRows, cut
from engine.core.units import LATENT_FACTOR
from engine.generation.outputs import IMAGE
from engine.generation.run import Job, load_model, picture_keys, prepare, provenance
from engine.images.ome_zarr import CHUNK_PX, TOP_PX, Image
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig
from engine.sampling.denoiser import DenoiseTiles, LocalDenoiser
from engine.sampling.pixels import decode_rows, to_uint8
from engine.sampling.plan import Pass, Plan, Tiling, touching
from engine.sampling.sampler import Sampling, predict_window
from engine.sampling.ssl_grid import extend_grid

TRIES = 10
"""Times the latents are copied again because a commit came in between."""


def find_picture(folder: Path) -> Image | None:
    """Return a run's picture if it is decoded, pyramid included. Raises CanvasError."""
    state = load_state(folder / "state.json")
    if not (folder / IMAGE).exists() or state.progress.decoded_px < picture_size(state)[0]:
        return None
    image = Image.open(folder / IMAGE)
    return image if max(image.sizes[-1]) <= TOP_PX else None


def picture_size(state: RunState) -> tuple[int, int]:
    """Return (h, w) in px of the picture a run makes."""
    return int(str(state.keys["canvas.height"])), int(str(state.keys["canvas.width"]))


def check_region(region: Box, size: tuple[int, int]) -> None:
    """Hold a region (px) to a picture. Raises ValueError."""
    if not (0 <= region.y0 < region.y1 <= size[0] and 0 <= region.x0 < region.x1 <= size[1]):
        raise ValueError(
            f"a region must lie inside the picture, {size[1]} x {size[0]} px (width x height), and not be empty; got "
            f"{region.x1 - region.x0} x {region.y1 - region.y0} px at x={region.x0}, y={region.y0}."
        )


def crop(image: Image, region: Box, path: Path) -> Image:
    """Copy a region (px) of a picture, with a pyramid of its own. Raises ValueError, CanvasError."""
    check_region(region, image.sizes[0])
    tops = range(region.y0, region.y1, CHUNK_PX)
    rows = (image.read(y, min(y + CHUNK_PX, region.y1), region.x0, region.x1) for y in tops)
    said = {**image.provenance, **_placed(region)}
    return Image.of_rows(path, rows, region.size, image.mpp_um, path.name, said)


def _placed(region: Box) -> dict[str, object]:
    return {"region_xywh_px": region.xywh}


def predict_picture(folder: Path, config: RunConfig, region: Box | None, scratch: Path) -> Image:
    """Predict and decode what a run at work shows, in px of the base magnification; None takes the whole canvas.

    `config` is the run's own; the latents and the picture are put into `scratch`.
    Raises: ValueError for a region outside; CanvasMismatchError if the config or the weights are not those of the run;
    CanvasError if nothing is committed yet or the run is faster than the copy.
    """
    job = prepare(config)
    height, width = job.plan.size_px
    wanted = region or Box(0, 0, height, width)
    check_region(wanted, (height, width))
    model, grid, keys = same_model(folder, job)
    device = choose_device(config.model.device)
    keep_freed_memory(device)
    denoiser = LocalDenoiser(model.to(device))
    state, canvas = copy_latents(folder, job.plan, wanted, scratch)
    with canvas:
        reach = Reach.of(job.plan, state, wanted)
        s = _sampling(job, canvas, grid, denoiser)
        said = {**provenance(job, state.digest, keys), **reach.said(), **(_placed(wanted) if region else {})}
        path = scratch / IMAGE
        return Image.of_rows(path, picture_rows(s, reach, wanted), wanted.size, job.model.base_mpp, path.name, said)


def same_model(folder: Path, job: Job) -> tuple[ZoomLDM, np.ndarray, dict[str, object]]:
    """Load the run's weights and grid, and hold both and the config to its keys."""
    old = load_state(folder / "state.json").keys
    pin_arithmetic(job.config.model.threads)
    model, grid = load_model(job.config), stored_grid(folder / STORED)
    keys = picture_keys(job.config, model, Conditions(grid, str(old.get("conditions"))))
    levels = {f"plan.levels.{name}": size for name, size in job.plan.arrays.items()}
    check_run_keys(folder, old, plain(keys | levels))
    return model, grid, old


def _sampling(job: Job, canvas: Canvas, grid: np.ndarray, denoiser: DenoiseTiles) -> Sampling:
    return Sampling(
        plan=job.plan,
        canvas=canvas,
        grid=extend_grid(grid, *job.plan.covered_cells),
        denoiser=denoiser,
        guidance=job.config.guidance,
        canvas_guidance=None,
        decode_sigma=job.config.decode.sigma,
        noise=keyed_noise(job.config.sampling.seed),
        watch=Progress(),
    )


@dataclass(frozen=True)
class Reach:
    """What a region takes of the finest level at one commit. Boxes in latent px."""

    pass_: Pass
    number: int
    """Steps of the pass that are committed."""
    last: bool
    """Whether no pass follows."""
    tiling: Tiling | None
    """Tiles to predict, in `latents`; None when the latents are clean."""
    latents: Box
    windows: Tiling
    """Windows to decode, in `decoded`."""
    decoded: Box

    @classmethod
    def of(cls, plan: Plan, state: RunState, region: Box) -> "Reach":
        """`region` is in px of the picture. Raises CanvasError while only coarser levels are sampled."""
        progress = state.progress
        pass_, number = plan.passes[progress.pass_index], progress.steps
        windows, decoded = touching(plan.decode, region.latent())
        last = progress.pass_index == len(plan.passes) - 1
        tiling = pass_.tilings[-1]
        if tiling is None:
            raise CanvasError(
                f"a run must have begun with {plan.finest.name} before it can be shown; it is at step {number} of "
                f"{len(pass_.steps)} of its guide, {pass_.name}. Wait for that, or look at a finished run."
            )
        if number == len(pass_.steps):
            return cls(pass_, number, last, None, decoded, windows, decoded)
        return cls(pass_, number, last, *touching(tiling, decoded), windows, decoded)

    def said(self) -> dict[str, object]:
        """Return what an unfinished picture says of itself."""
        if self.tiling is None and self.last:
            return {}
        done = {"pass": self.pass_.name, "steps_done": self.number, "steps": len(self.pass_.steps)}
        if self.tiling is None:
            return {"unfinished": done}
        return {"unfinished": {**done, "timestep": self.pass_.steps[self.number].t, "guidance": "left out"}}


def copy_latents(folder: Path, plan: Plan, region: Box, scratch: Path) -> tuple[RunState, Canvas]:
    """Copy the latents a region (px) takes, all of one commit, to a canvas of their own in `scratch`; close it.

    Raises: CanvasError if nothing is committed, a chunk is damaged, or a commit came in between every time.
    """
    name = plan.finest.name
    for attempt in range(TRIES):
        view = CanvasView(folder)
        box = Reach.of(plan, view.state, region).latents
        canvas = Canvas.open(scratch / f"latents_{attempt}", {}, {name: box.size})
        try:
            for y0 in range(0, box.size[0], BAND):
                rows = view.read(name, box.y0 + y0, min(box.y0 + y0 + BAND, box.y1))
                canvas.write(name, y0, np.ascontiguousarray(rows[:, :, box.x0 : box.x1]))
            if not view.moved():
                canvas.commit(view.state.progress.pass_index, view.state.progress.steps)
                return view.state, canvas
        except CanvasError:
            if not view.moved():
                canvas.close()
                raise
        canvas.close()
    raise CanvasError(
        f"{folder} must stand still while its latents are copied; it committed a step meanwhile, {TRIES} times. Ask "
        "for a smaller region, or stop the run first."
    )


def picture_rows(s: Sampling, reach: Reach, region: Box) -> Iterator[np.ndarray]:
    """Yield the region's picture top to bottom, uint8 (3, n, w); s.canvas holds the latents of `reach`."""
    finest, f = s.plan.finest, LATENT_FACTOR
    height, width = reach.latents.size
    level = replace(finest, height=height, width=width)
    x0: ReadRows = lambda y0, y1: s.canvas.read(finest.name, y0, y1)  # noqa: E731  # clean latents are their own x0
    if reach.tiling is not None:
        origin = reach.latents.y0, reach.latents.x0
        x0 = ForwardReader(predict_window(s, reach.pass_, reach.number, level, reach.tiling, origin))
    inside = reach.decoded.moved(reach.latents.y0, reach.latents.x0)

    def read(y0: int, y1: int) -> np.ndarray:
        return x0(y0 + inside.y0, y1 + inside.y0)[:, :, inside.x0 : inside.x1]

    rows = decode_rows(read, reach.decoded.size, reach.windows, s.denoiser, s.decode_sigma, "export")
    part = region.moved(reach.decoded.y0 * f, reach.decoded.x0 * f)
    return cut(map(to_uint8, rows), (part.y0, part.y1), (part.x0, part.x1))
