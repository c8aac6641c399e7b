"""From what a command is asked for to its exit code: what those that sample a canvas do alike.

It does not know command lines. Who computes on a cluster is the command's choice: the engine imports no Ray.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch

from engine.config import RunConfig
from engine.devices import UNSEEN_GPU, Hardware, choose_device, hardware_of
from engine.environment import AUTO, explain_dtype, settle_run, this_process
from engine.errors import EngineError
from engine.estimate import plan_table
from engine.interruption import sigterm_as_exit
from engine.model.zoomldm import ZoomLDM
from engine.progress import Progress
from engine.redo import RedoJob, redo
from engine.run import Crew, Job, run, work_alone

EngageOnRay = Callable[[ExitStack, ZoomLDM, RunConfig], AbstractContextManager[Crew]]
"""Puts a model to work on Ray's replicas; Ray is left with the stack."""
AskRay = Callable[[RunConfig], Hardware]
"""Finds out what Ray's replicas would compute on."""


def finish(
    prog: str,
    prepared: Callable[[], Job | RedoJob],
    on_ray: EngageOnRay,
    ask_ray: AskRay,
    progress: Progress,
    plan_only: bool = False,
) -> int:
    """Plan and do the work, or a redo's; print what became of it and return the exit code."""
    job = None
    try:
        # Ray is left after the report, whose scores are metrics too.
        with sigterm_as_exit(), ExitStack() as connection:
            try:
                job = prepared()
            except ValueError as error:  # the command asks for what this model, run or picture has not
                progress.say(f"{prog}: {error}")
                return 2
            config = job.config
            if plan_only and isinstance(job, Job):
                sys.stdout.write(plan_of(job) + "\n")
                return 0
            engage, ask = work_alone, this_process(config.model.device)
            if config.ray.enabled:
                engage, ask = partial(on_ray, connection), partial(ask_ray, config)
            folder = run(job, engage, progress, ask) if isinstance(job, Job) else redo(job, engage, progress)
    except EngineError as error:
        progress.close()
        progress.say(f"{prog}: {error}")
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:  # SIGTERM raises SystemExit
        progress.close()
        kept = "the run folder" if job is None else job.config.canvas.store or job.folder
        progress.say(f"Interrupted. Every finished step is in {kept}; run the same command again to continue.")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    sys.stdout.write(f"The pictures are in {folder}: preview.png shows canvas and guide side by side.\n")
    return 0


def plan_of(job: Job) -> str:
    """Return what --plan prints, for this machine; a GPU that is asked for and not here is taken to be a new one.

    Raises: EngineError.
    """
    asked = job.config.model
    unseen = asked.device == "cuda" and not torch.cuda.is_available()
    hardware = UNSEEN_GPU if unseen else hardware_of(choose_device(asked.device))
    config = settle_run(job.config, None, lambda: hardware)  # a plan asks a bucket nothing
    reason = explain_dtype(asked.dtype, config.model.dtype, hardware)
    if asked.dtype == AUTO and job.config.ray.enabled and job.config.ray.address not in (None, "local"):
        reason += "; the cluster's own nodes may differ"
    return plan_table(job.plan, config, job.model, hardware.device, reason)
