"""The order of a redo: a region of a finished run sampled again, into a run folder of its own beside it.

The run that it is made of is only read. State, resume and exports are those of engine.generation.run; the canvas is the
window's.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.canvas.canvas import BAND, Canvas
from engine.canvas.run_state import check_run_keys
from engine.conditions.conditions import SAID_OF_TEXT, Conditions
from engine.core.files import plain, replacing, write_json
from engine.core.numerics import Noise, noise_rows
from engine.core.progress import Clock, Progress
from engine.core.runtime import pin_arithmetic, settle_dtype, this_process
from engine.core.streaming import BandReader, Box, ForwardReader
from engine.core.units import LATENT_FACTOR
from engine.generation import outputs
from engine.generation.finished_run import RECORD, FinishedRun
from engine.generation.inpaint_region import RIM_PX, OldPicture, Window, laid_over, mix, window_plan, window_under
from engine.generation.outputs import GUIDE, IMAGE, REPORT, border_scores
from engine.generation.preview import check_region
from engine.generation.run import (
    Job,
    canvas_guidance,
    load_model,
    picture_keys,
    prepare,
    provenance,
    stored_config,
    write_config,
)
from engine.generation.session import StartBackend, session
from engine.images.ome_zarr import CHUNK_PX, TOP_PX, Image
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig
from engine.sampling.denoiser import DenoiseTiles
from engine.sampling.guidance import GuidePicture
from engine.sampling.pixels import clamped, decode_part, to_uint8
from engine.sampling.plan import Plan
from engine.sampling.sampler import Sampling
from engine.sampling.ssl_grid import extend_grid

FROM_T = 600
"""Timestep to noise a region back to: most colours and places stay, all detail is new."""


@dataclass(frozen=True)
class InpaintConfig:
    """What to sample again. Other keys are the run's own; those that do not decide its picture may be given anew."""

    run: str
    """Folder of a finished run; may be given last, without --run."""
    redo: str
    """Region: x,y,width,height in px of the base magnification."""
    seed: int
    """Seed of the new noise. The run's own is allowed: the noise depends on the run, too."""
    from_t: int | None = None
    """Timestep to noise the region back to: near 1000 little stays but the guide, near 1 little changes. None takes
    600, or the one at which the run began with its finest level if that is lower."""

    def __post_init__(self) -> None:
        _ = self.region
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2**63-1; got {self.seed}.")

    @property
    def region(self) -> Box:
        return Box.parse(self.redo)

    @property
    def name(self) -> str:
        """A folder name that says what is in it."""
        x, y, width, height = self.region.xywh
        t = "" if self.from_t is None else f"_t{self.from_t}"
        return f"{Path(self.run).resolve().name}_redo_x{x}_y{y}_{width}x{height}{t}_seed{self.seed}"


@dataclass(frozen=True)
class InpaintJob:
    """What is decided before a weight is used."""

    job: Job
    """The run's config and whole plan; the folder is the redo's."""
    finished: FinishedRun
    asked: InpaintConfig
    window: Window
    plan: Plan
    """The window's."""

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def config(self) -> RunConfig:
        return self.job.config

    def keys(self) -> dict[str, object]:
        """Return what decides the new picture's bytes."""
        run = {k: v for k, v in self.finished.root.keys.items() if not k.startswith("plan.levels.")}
        a = self.asked
        return run | {
            "redo.region": a.region.xywh,
            "redo.seed": a.seed,
            "redo.from_t": a.from_t,
            "redo.parent": self.finished.digest,
        }

    def said(self) -> dict[str, object]:
        """Return what picture and report say of the redo."""
        return {
            "run": os.path.relpath(self.finished.folder.resolve(), self.folder.resolve()),
            "parent_plan": self.finished.digest,
            "region_xywh_px": self.asked.region.xywh,
            "window_xywh_px": self.window.pixels(self.job.plan.size_px).box.xywh,
            "seed": self.asked.seed,
            "from_t": self.asked.from_t,
        }


def region_folder(asked: InpaintConfig, finished: FinishedRun) -> Path:
    """Return the run folder of a region, beside the run's, unless another is asked for."""
    return finished.folder.resolve().parent / asked.name


def config_files(asked: InpaintConfig, finished: FinishedRun) -> list[str]:
    """Return the flags that stand for the run's own configuration, in the region's folder.

    Raises: EngineError when the run has no config.yaml.
    """
    stored_config(finished.root.folder)
    stored = finished.root.folder / "config.yaml"
    return [f"--config={stored.resolve()}", f"--output.folder={region_folder(asked, finished)}"]


def prepare_inpaint(asked: InpaintConfig, finished: FinishedRun, config: RunConfig) -> InpaintJob:
    """Cut the window; `config` is the run's own, with another folder.

    Raises: ValueError for a region or timestep the run has not; CanvasError without its picture; CheckpointError
    without its model.
    """
    finished.picture()
    used = str(finished.root.keys["model.dtype"])  # what auto came to there: the region must be of the same kind
    kept = settle_dtype(config.model.dtype, lambda: used, this_process(config.model.device))
    job = prepare(replace(config, model=replace(config.model, dtype=kept)))  # type: ignore[arg-type]  # one of the key's
    if job.plan.given:
        raise ValueError(
            f"a region can be sampled again where the guide was sampled too; that of {finished.folder} was given. "
            "Repeat the run with another sampling.seed and output.folder."
        )
    check_region(asked.region, job.plan.size_px)
    _, window = window_under(job.plan, asked.region)
    from_t = min(FROM_T, job.plan.finest_pass.steps[0].t) if asked.from_t is None else asked.from_t
    plan = window_plan(job.plan, asked.region, from_t)
    return InpaintJob(job, finished, replace(asked, from_t=from_t), window, plan)


def redo(r: InpaintJob, start_backend: StartBackend, progress: Progress) -> Path:
    """Make, continue or complete the redo in its folder; return the folder.

    Raises: CanvasMismatchError if config or weights are not the run's, or another plan lies in the folder; EngineError.
    """
    clock, job = Clock(), r.job
    pin_arithmetic(job.config.model.threads)  # the guidance's own arithmetic, as in a run
    with clock.phase("model"):
        model = load_model(job.config)
    _check_run(r, model)
    with Canvas.open(r.folder, r.keys(), r.plan.arrays) as canvas:
        missing = outputs.missing(r.folder, job.config, job.plan)
        if canvas.progress.finished and not missing:
            progress.say(f"{r.folder} holds this redo, finished; nothing is missing.")
            return r.folder
        if IMAGE in missing:
            canvas.record(decoded_px=0, finished=False)
        _take_along(r, missing)
        write_config(job, f"# That of the whole picture; {RECORD} says which region was sampled again.\n")
        facts: dict[str, object] = {}
        if not canvas.progress.finished or IMAGE in missing:
            with session(canvas, job.dtypes, start_backend(model, job.config), progress, clock) as work:
                with clock.phase("guidance"):
                    s = _sampling(r, model, canvas, work.denoiser, progress)
                work.sample(s)
                progress.say("decoding")
                with clock.phase("decoding"):
                    _decode(r, s, provenance(job, canvas.digest, canvas.keys))
            facts = work.facts
        outputs.export(r.folder, job.config, job.plan, clock)
        canvas.record(finished=True)
        if facts or REPORT in missing:
            facts = {"plan": canvas.digest, "redo": r.said() | judged(r), **facts}
            progress.judged(outputs.report(r.folder, job.config, job.plan, facts, clock))
    return r.folder


def _check_run(r: InpaintJob, model: ZoomLDM) -> None:
    """Hold config and weights to the run's: what is sampled beside its latents must be of the same kind."""
    root = r.finished.root
    levels = {f"plan.levels.{name}": size for name, size in r.job.plan.arrays.items()}
    said = {name: root.keys[name] for name in SAID_OF_TEXT if name in root.keys}
    found = Conditions(r.finished.grid, str(root.keys.get("conditions")), said=said)
    keys = picture_keys(r.job.config, model, found)
    check_run_keys(root.folder, root.keys, plain(keys | levels))


def _take_along(r: InpaintJob, missing: list[str]) -> None:
    """Write the record, and copy what the run made once: the guide's picture and a fitted colour map."""
    write_json(r.folder / RECORD, r.said())
    maps = [p.name for p in r.finished.root.folder.glob("guidance_*.safetensors") if not (r.folder / p.name).exists()]
    for name in [*maps, *([GUIDE] if GUIDE in missing else [])]:
        with replacing(r.folder / name) as partial:
            shutil.copyfile(r.finished.root.folder / name, partial)


def _sampling(r: InpaintJob, model: ZoomLDM, canvas: Canvas, denoiser: DenoiseTiles, progress: Progress) -> Sampling:
    job, finest, box = r.job, r.job.plan.finest.name, r.window.box
    grid = extend_grid(r.finished.grid, *job.plan.covered_cells)

    def old(y0: int, y1: int) -> np.ndarray:
        return r.finished.latents(job.plan, finest, Box(box.y0 + y0, box.x0, box.y0 + y1, box.x1))

    guided = any(p.guided for p in r.plan.passes)
    around = OldPicture(r.window, BandReader(old, r.plan.finest.height, BAND))
    return Sampling(
        plan=r.plan,
        canvas=canvas,
        grid=grid,
        denoiser=denoiser,
        guidance=job.config.guidance,
        canvas_guidance=canvas_guidance(job, model, r.finished.grid, canvas, denoiser, progress) if guided else None,
        decode_sigma=job.config.decode.sigma,
        noise=inpaint_noise(r.asked.seed, r.finished.digest),
        watch=progress,
        guide=guide_under(r, denoiser) if guided else None,
        around=around,
    )


def inpaint_noise(seed: int, parent: str) -> Noise:
    """Return a redo's noise: what made the old latents, were it drawn again, would show in the new ones."""
    return lambda stream, step, rows, width: noise_rows(seed, f"redo/{parent}/{stream}", step, rows, width)


def guide_under(r: InpaintJob, denoiser: DenoiseTiles) -> GuidePicture:
    """Decode the finished guide over the window, and a px beyond, which newton mixes in."""
    plan, box = r.job.plan, r.window.box
    level, ratio = plan.levels[-2], plan.levels[-2].factor // plan.finest.factor
    cell = max(ratio // LATENT_FACTOR, r.config.guidance.cell)
    starts = (start // cell * cell * LATENT_FACTOR // ratio for start in (box.y0, box.x0))
    ends = (-(-end // cell) * cell * LATENT_FACTOR // ratio + 1 for end in (box.y1, box.x1))
    whole = Box(0, 0, level.height * LATENT_FACTOR, level.width * LATENT_FACTOR)
    part = Box(*starts, *ends).within(whole)
    rows = decode_part(
        lambda under: r.finished.latents(plan, level.name, under),
        plan.decodes[-2], part, denoiser, r.job.config.decode.sigma, "redo/guide",
    )  # fmt: skip
    return GuidePicture(clamped(rows, *part.size), ratio, (box.y0 % cell, box.x0 % cell))


def _decode(r: InpaintJob, s: Sampling, said: dict[str, object]) -> None:
    """Write the picture from where that was interrupted: copied, and decoded where the window is."""
    path, (height, width) = r.folder / IMAGE, r.job.plan.size_px
    start = s.canvas.progress.decoded_px if path.exists() else 0
    said = {**said, "redo": r.said()}
    image = Image.open(path) if start else Image.create(path, height, width, r.job.model.base_mpp, r.folder.name, said)
    if start < height:
        for done in image.fill(_picture_rows(r, s, start), start):
            s.canvas.record(decoded_px=done)
    if max(image.sizes[-1]) > TOP_PX:
        image.build_pyramid()


def _picture_rows(r: InpaintJob, s: Sampling, start: int) -> Iterator[np.ndarray]:
    """Yield the picture from row `start` on, uint8 (3, n, w)."""
    picture, window = r.finished.picture(), r.window.pixels(r.job.plan.size_px)
    height, width = r.job.plan.size_px
    box, skipped = window.box, max(start - window.box.y0, 0)
    finest = r.job.plan.finest.name

    def latents(part: Box) -> np.ndarray:
        old = r.finished.latents(r.job.plan, finest, part)
        return laid_over(old, part, r.window, lambda y0, y1, x0, x1: s.canvas.read(finest, y0, y1)[:, :, x0:x1])

    fresh = decode_part(latents, r.job.plan.decode, box, s.denoiser, s.decode_sigma, "decode", skipped)
    new = ForwardReader(map(to_uint8, fresh))
    for y0 in range(start, height, CHUNK_PX):
        strip = Box(y0, 0, min(y0 + CHUNK_PX, height), width)
        inside, rows = strip.within(box), picture.read(strip.y0, strip.y1)
        if inside.size[0]:
            part = np.s_[:, inside.y0 - y0 : inside.y1 - y0, inside.x0 : inside.x1]
            top = inside.y0 - box.y0 - skipped
            mixed = mix(rows[part].astype(np.float32), new(top, top + inside.size[0]), window.share(inside))
            rows[part] = np.rint(mixed).astype(np.uint8)
        yield rows


def judged(r: InpaintJob) -> dict[str, object]:
    """Return the scores of the window's border, and what the run's own picture has at the same place."""
    box = r.window.pixels(r.job.plan.size_px).box
    before = {f"{k}_before": v for k, v in border_scores(r.finished.picture(), box, RIM_PX).items()}
    return border_scores(Image.open(r.folder / IMAGE), box, RIM_PX) | before
