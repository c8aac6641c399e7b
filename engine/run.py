"""The order of a run around sample_large: model, plan, conditions, canvas, sampling, decoding, exports, report.

A run that is invoked again does only what is missing. Who computes is the caller's choice (`Crew`), so this module
imports no Ray; generate_large.py and the benchmarks share it.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from engine import __version__, outputs
from engine.canvas import Canvas
from engine.conditions import STORED, Conditions, find_conditions, keep_conditions
from engine.config import ModelConfigSection, RunConfig
from engine.devices import Ask, Hardware, choose_device, encoder_device, keep_freed_memory, pin_arithmetic, torch_dtype
from engine.environment import ENVIRONMENT, check_environment, facts_of, remark_on_dtype, settle_run, this_process
from engine.exports.png import check_png
from engine.guidance import CanvasGuidance, make_canvas_guidance
from engine.model import checkpoint, hub
from engine.model.config import ModelConfig
from engine.model.zoomldm import ZoomLDM, digest
from engine.pilot import stored_or_fitted
from engine.predict import DenoiseTiles, LocalDenoiser
from engine.progress import Clock, Onlooker, Progress, TimedDenoiser
from engine.sampler import Sampling, keyed_noise, sample_large
from engine.state import write_atomically
from engine.storage import open_storage
from engine.tiles import Plan, make_plan

_WHERE = (
    *("model.source", "model.variant", "model.device", "model.cdm_source"),
    *("canvas.store", "reference", "embeddings"),
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

    @property
    def folder(self) -> Path:
        return Path(self.config.output.folder)


@dataclass(frozen=True)
class Crew:
    """Who computes: the denoiser, on what, how many replicas live, facts for the report, and an onlooker."""

    denoiser: DenoiseTiles
    hardware: Hardware
    """Of the first replica."""
    alive: Callable[[], int]
    facts: Callable[[], dict[str, object]]
    onlooker: Onlooker | None = None
    """Told of progress and scores; the scores come after the crew has left."""


Engage = Callable[[ZoomLDM, RunConfig], AbstractContextManager[Crew]]
"""Puts the model, which lies on the CPU, to work."""


def describe(section: ModelConfigSection) -> ModelConfig:
    """Return what the model is. Raises: CheckpointError when it cannot be had."""
    return checkpoint.read(hub.locate(section.source, section.variant)).config


def prepare(config: RunConfig, model: ModelConfig | None = None) -> Job:
    """Cut the plan; `model` is what `describe` returns, if that is known.

    Raises: CheckpointError when the model cannot be had; ValueError when the config asks for what it has not.
    """
    model = model or describe(config.model)
    plan = make_plan(config, model.scale)
    if "png" in config.output.formats:
        check_png(config.canvas.height, config.canvas.width)
    return Job(config, model, plan)


def run(job: Job, engage: Engage, progress: Progress, ask: Ask | None = None) -> Path:
    """Make, continue or complete the run in its folder; return the folder.

    `ask` tells what the crew will compute on; None: this process does.
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
        model = load_model(job.config)
    with clock.phase("conditions"):
        conditions = find_conditions(job.config, model, job.plan, encoder_device(job.config), progress)
    keys, record = picture_keys(job.config, model, conditions), job.config.output.record_writers
    with Canvas.open(job.folder, keys, job.plan.arrays, storage, record) as canvas:
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
            facts = compute(
                job, canvas, lambda: engage(model, job.config), progress, clock,
                lambda denoiser: _sampling(job, model, conditions, canvas, denoiser, progress),
                lambda s: outputs.decode(s, job.folder, job.model.base_mpp, said),
            )  # fmt: skip
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


def picture_keys(config: RunConfig, model: ZoomLDM, conditions: Conditions) -> dict[str, object]:
    """Return what decides the picture's bytes, flat: the config, the weights and the conditions."""
    keys = {k: v for k, v in config.picture_keys().items() if k not in _WHERE}
    return keys | {"model.weights": digest(model), "conditions": conditions.digest}


def write_config(job: Job) -> None:
    """Write config.yaml, which `--config` reads back to the same run."""
    plain = json.loads(json.dumps(asdict(job.config)))  # tuples become lists, which YAML knows
    write_atomically(job.folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False).encode())


def _announce(canvas: Canvas, missing: list[str], progress: Progress) -> None:
    now = canvas.progress
    if now.finished:
        progress.say(f"{canvas.folder} holds this run, finished; making what is missing: {', '.join(missing)}.")
    elif not canvas.fresh:
        progress.say(f"{canvas.folder} holds this run; continuing after step {now.steps} of pass {now.pass_index + 1}.")


def compute(
    job: Job,
    canvas: Canvas,
    engage: Callable[[], AbstractContextManager[Crew]],
    progress: Progress,
    clock: Clock,
    prepared: Callable[[DenoiseTiles], Sampling],
    decode: Callable[[Sampling], None],
) -> dict[str, object]:
    """Do what needs the networks: `prepared`'s sampling, then `decode`. Returns facts for the report."""
    resumed = not canvas.fresh
    with ExitStack() as stack:
        with clock.phase("start"):
            crew = stack.enter_context(engage())
        stack.callback(progress.close)
        arithmetic = (job.asked_dtype, job.config.model.dtype, crew.hardware)
        said = facts_of(*arithmetic)
        with canvas.shared(ENVIRONMENT):
            check_environment(job.folder, said)
        if line := remark_on_dtype(*arithmetic):
            progress.say(line)
        progress.replicas, progress.onlooker = crew.alive, crew.onlooker
        timed = TimedDenoiser(crew.denoiser)
        with clock.phase("guidance"):
            s = prepared(timed)
        before = timed.waited_s
        with clock.phase("sampling"):
            sample_large(s)
        waited = timed.waited_s - before
        progress.say("decoding")
        with clock.phase("decoding"):
            decode(s)
        return {
            **crew.facts(),
            **said,
            "resumed": resumed,
            "tiles": progress.tile_count,
            "tiles_per_s": progress.tile_count / max(clock.seconds["sampling"], 1e-9),
            "orchestration_share": 1 - waited / max(clock.seconds["sampling"], 1e-9),
        }


def provenance(job: Job, plan: str, keys: dict[str, object]) -> dict[str, object]:
    """Return what every picture says of itself: `plan` is the digest of `keys`. Image adds that it is synthetic."""
    section = job.config.model
    return {
        "generator": f"zoomldm-engine {__version__}",
        "model": section.source if section.variant is None else f"{section.source}/{section.variant}",
        "plan": plan,
        "seed": job.config.sampling.seed,
        "config": keys,
    }


def _sampling(
    job: Job, model: ZoomLDM, conditions: Conditions, canvas: Canvas, denoiser: DenoiseTiles, progress: Progress
) -> Sampling:
    config, grid = job.config, conditions.grid
    return Sampling(
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


def canvas_guidance(
    job: Job, model: ZoomLDM, grid: np.ndarray, canvas: Canvas, denoiser: DenoiseTiles, progress: Progress
) -> CanvasGuidance | None:
    """Return the coordinator's part of the guidance; fits the map, once per canvas, where the checkpoint has none."""
    config, method = job.config, job.config.guidance.method
    if not any(p.guided for p in job.plan.passes):
        return None
    maps = dict(model.extras)
    if method in ("linear", "probe") and f"guidance/{method}" not in maps:
        progress.say(f"fitting the {method} guidance: the checkpoint carries no map")
        path = job.folder / f"guidance_{method}.safetensors"
        with canvas.shared(path.name):
            maps |= stored_or_fitted(path, method, grid, denoiser, config.sampling.weight, config.sampling.batch_size)
    return make_canvas_guidance(config.guidance, maps)


@contextmanager
def work_alone(model: ZoomLDM, config: RunConfig) -> Iterator[Crew]:
    """Compute in this process, without Ray (ray.enabled=false)."""
    device = choose_device(config.model.device)
    pin_arithmetic(config.model.threads)
    keep_freed_memory(device)
    denoiser = LocalDenoiser(model.to(device))
    yield Crew(denoiser, this_process(device)(), lambda: 1, lambda: {"replicas": 1, "restarts": 0})
