"""The order of a run around sample_large: model, plan, conditions, canvas, sampling, decoding, exports, report.

A run that is invoked again does only what is missing. Who computes is the caller's choice (`Backend`), so this module
imports no Ray; generate_large.py and the benchmarks share it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from engine import __version__
from engine.canvas.canvas import Canvas
from engine.canvas.environment import dtype_of_run
from engine.canvas.live_preview import LivePreviews, Shown, affine_colour
from engine.canvas.storage import Storage, open_storage
from engine.conditions.conditions import STORED, Conditions, find_conditions, keep_conditions
from engine.core.cli import configured
from engine.core.config import ModelConfigSection
from engine.core.errors import EngineError
from engine.core.files import write_atomically
from engine.core.numerics import keyed_noise
from engine.core.progress import Clock, Progress
from engine.core.runtime import (
    Ask,
    encoder_device,
    pin_arithmetic,
    settle_dtype,
    this_process,
    torch_dtype,
)
from engine.generation import outputs
from engine.generation.guidance_fit import stored_or_fitted
from engine.generation.session import StartBackend, session
from engine.images.png import check_png
from engine.model.colour_map import LinearColour
from engine.model.config import ModelConfig
from engine.model.weights import hub, ldm_import
from engine.model.zoomldm import ZoomLDM, digest
from engine.sampling.config import RunConfig
from engine.sampling.denoiser import (
    DenoiseTiles,
)
from engine.sampling.guidance import CanvasGuidance, make_canvas_guidance
from engine.sampling.plan import Plan, from_guide, make_plan
from engine.sampling.sampler import Sampling

PLACES = (
    *("model.source", "model.variant", "model.device", "model.cdm_source"),
    *("model.text_source", "model.text_tower_source"),
    *("canvas.store", "reference", "embeddings", "text_map"),
)
"""Keys that say where something lies; what lies there counts instead (weights, conditions, device)."""


@dataclass(frozen=True)
class Job:
    """What is decided before a weight is used."""

    config: RunConfig
    model: ModelConfig
    plan: Plan
    asked_dtype: str = ""
    """model.dtype before auto was settled; empty: as it is."""
    origin: Mapping[str, str] = field(default_factory=dict[str, str])
    """What files say besides: from which slide and patient the conditions are. Decides no px."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output.folder)

    @property
    def dtypes(self) -> tuple[str, str]:
        """model.dtype as it was asked for and as it is."""
        return self.asked_dtype, self.config.model.dtype


@dataclass(frozen=True)
class Loaded:
    """A model that several runs share, on the CPU or where their backend has put it."""

    model: ZoomLDM
    weights: str
    """Its digest, which takes seconds for a published model."""

    @classmethod
    def of(cls, config: RunConfig) -> "Loaded":
        """Load the model of a run whose dtype is settled. Raises: CheckpointError."""
        model = load_model(config)
        return cls(model, digest(model))


def describe(section: ModelConfigSection) -> ModelConfig:
    """Return what the model is. Raises: CheckpointError when it cannot be had."""
    return ldm_import.config_of(hub.locate(section.source, section.variant))


def prepare(config: RunConfig, model: ModelConfig | None = None) -> Job:
    """Cut the plan; `model` is what `describe` returns, if that is known.

    Raises: CheckpointError when the model cannot be had; ValueError when the config asks for what it has not.
    """
    model = model or describe(config.model)
    plan = make_plan(config, model.scale)
    if begins := from_guide(config, plan.levels):  # into keys and config.yaml: its default may change
        config = replace(config, sampling=replace(config.sampling, from_guide=begins))
    if "png" in config.output.formats:
        check_png(config.canvas.height, config.canvas.width)
    return Job(config, model, plan)


def run(
    job: Job, start_backend: StartBackend, progress: Progress, ask: Ask | None = None, loaded: Loaded | None = None
) -> Path:
    """Make, continue or complete the run in its folder; return the folder.

    `ask` tells what the backend will compute on; None: this process does. `loaded` saves loading the model: it is the
    one that the config names, in a dtype that is settled.
    Raises: EngineError with what the user can do. What is committed survives any error and Ctrl-C.
    """
    clock = Clock()
    # This process's own arithmetic (guidance, inversion) is part of the picture's bytes, wherever replicas compute.
    pin_arithmetic(job.config.model.threads)
    store = job.config.canvas.store
    storage = None if store is None else open_storage(store)
    if storage is not None:
        storage.check()  # before minutes are spent on a model
    with clock.phase("model"):
        section = job.config.model
        settled = settle_run(job.config, storage, ask or this_process(section.device))
        job = replace(job, config=settled, asked_dtype=section.dtype)
        found = loaded or Loaded.of(job.config)
        model = found.model
    with clock.phase("conditions"):
        conditions = find_conditions(job.config, model, job.plan, encoder_device(job.config.model), progress)
    keys = picture_keys(job.config, model, conditions, found.weights)
    with Canvas.open(job.folder, keys, job.plan.arrays, storage) as canvas:
        missing = outputs.missing(job.folder, job.config, job.plan)
        if canvas.progress.finished and not missing:
            progress.say(f"{job.folder} holds this run, finished; nothing is missing.")
            return job.folder
        _announce(canvas, missing, progress)
        if outputs.IMAGE in missing:
            canvas.record(decoded_px=0, finished=False)
        write_config(job)
        with canvas.shared(STORED):
            keep_conditions(job.folder, conditions)
        facts: dict[str, object] = {}
        if not canvas.progress.finished or outputs.needs_network(missing):
            said = provenance(job, canvas.digest, canvas.keys)
            with session(canvas, job.dtypes, start_backend(model, job.config), progress, clock) as work:
                with clock.phase("guidance"):
                    s = _sampling(job, model, conditions, canvas, work.denoiser, progress)
                work.sample(s)
                progress.say("decoding")
                with clock.phase("decoding"):
                    outputs.decode(s, job.folder, job.model.base_mpp, said)
            facts = work.facts
            if s.viewer is not None:
                facts["previews_s"] = s.viewer.spent_s
        outputs.export(job.folder, job.config, job.plan, clock)
        canvas.record(finished=True)
        if facts or "report.json" in missing:
            facts = {"plan": canvas.digest, **facts}
            progress.judged(outputs.report(job.folder, job.config, job.plan, facts, clock))
    return job.folder


def load_model(config: RunConfig) -> ZoomLDM:
    """Load the weights on the CPU, in the run's dtype and memory format."""
    section = config.model
    model = ZoomLDM.from_pretrained(section.source, section.variant, dtype=torch_dtype(section.dtype))
    return model.channels_last() if section.channels_last else model


def picture_keys(
    config: RunConfig, model: ZoomLDM, conditions: Conditions, weights: str | None = None
) -> dict[str, object]:
    """Return what decides the picture's bytes, flat: the config, the weights (by their digest) and the conditions."""
    keys = {k: v for k, v in config.picture_keys().items() if k not in PLACES}
    return keys | {"model.weights": weights or digest(model), "conditions": conditions.digest, **conditions.said}


def write_config(job: Job, head: str = "") -> None:
    """Write config.yaml, which `--config` reads back to the same run, below a comment."""
    plain = json.loads(json.dumps(asdict(job.config)))  # tuples become lists, which YAML knows
    write_atomically(job.folder / "config.yaml", (head + yaml.safe_dump(plain, sort_keys=False)).encode())


def stored_config(folder: Path, changes: Mapping[str, object] | None = None) -> RunConfig:
    """Return what config.yaml of a run says, with `changes` over it. Raises: EngineError when it is not there."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise EngineError(f"{path} must say how the run is made; it is not there. Run its command again.")
    return configured(RunConfig, path.resolve(), changes)


def _announce(canvas: Canvas, missing: list[str], progress: Progress) -> None:
    now = canvas.progress
    if now.finished:
        progress.say(f"{canvas.folder} holds this run, finished; making what is missing: {', '.join(missing)}.")
    elif not canvas.fresh:
        progress.say(f"{canvas.folder} holds this run; continuing after step {now.steps} of pass {now.pass_index + 1}.")


def provenance(job: Job, plan: str, keys: dict[str, object]) -> dict[str, object]:
    """Return what every picture says of itself: `plan` is the digest of `keys`. Image adds that it is synthetic."""
    section = job.config.model
    return {
        "generator": f"zoomldm-engine {__version__}",
        "model": section.source if section.variant is None else f"{section.source}/{section.variant}",
        "plan": plan,
        "seed": job.config.sampling.seed,
        **job.origin,
        "config": keys,
    }


def _sampling(
    job: Job, model: ZoomLDM, conditions: Conditions, canvas: Canvas, denoiser: DenoiseTiles, progress: Progress
) -> Sampling:
    config, grid = job.config, conditions.grid
    s = Sampling(
        plan=job.plan,
        canvas=canvas,
        grid=grid,
        denoiser=denoiser,
        guidance=config.guidance,
        canvas_guidance=canvas_guidance(job, model, grid, canvas, denoiser, progress),
        decode_sigma=config.decode.sigma,
        noise=keyed_noise(config.sampling.seed),
        watch=progress,
        guide=conditions.guide,
    )
    return replace(s, viewer=live_previews(job, model, s.canvas_guidance, progress))


def live_previews(job: Job, model: ZoomLDM, guidance: CanvasGuidance | None, progress: Progress) -> LivePreviews:
    """Return who writes what a run at work looks like, in the colours of the guidance's map or the checkpoint's."""
    colour: LinearColour | None = getattr(guidance, "colour", None)
    if colour is None and "guidance/linear" in model.extras:
        colour = LinearColour.from_tensors(model.extras["guidance/linear"])
    shown = Shown(
        colour=None if colour is None else affine_colour(colour.matrix.numpy(), colour.offset.numpy()),
        reduced={level.name: level.factor for level in job.plan.levels},
        mpp=job.model.base_mpp,
        tiles=lambda: progress.tile_count,
        replicas=lambda: progress.replicas() if progress.replicas is not None else 1,
    )
    return LivePreviews(job.folder, shown)


def canvas_guidance(
    job: Job, model: ZoomLDM, grid: np.ndarray, canvas: Canvas, denoiser: DenoiseTiles, progress: Progress
) -> CanvasGuidance | None:
    """Return the coordinator's part of the guidance; fits the map, once per canvas, where the checkpoint has none."""
    config, method = job.config, job.config.guidance.method
    if not any(p.guided for p in job.plan.passes):
        return None
    maps = dict(model.extras)
    if method == "linear" and "guidance/linear" not in maps:
        progress.say("fitting the linear guidance: the checkpoint carries no map")
        path = job.folder / "guidance_linear.safetensors"
        with canvas.shared(path.name):
            maps |= stored_or_fitted(path, grid, denoiser, config.sampling.weight, config.sampling.batch_size)
    return make_canvas_guidance(config.guidance, maps)


def settle_run(config: RunConfig, storage: Storage | None, ask: Ask) -> RunConfig:
    """Settle what is chosen by the machine or other keys: keys and config.yaml hold what it came to.

    That is model.dtype and, under a given guide, guidance.back_projection. Raises: EngineError.
    """
    folder = Path(config.output.folder)
    dtype = settle_dtype(config.model.dtype, lambda: dtype_of_run(folder, storage), ask)
    guidance = config.guidance if config.guide is None else config.guidance.settled(config.sampling.start)
    model = replace(config.model, dtype=dtype)  # type: ignore[arg-type]  # one of the key's
    return replace(config, model=model, guidance=guidance)
