"""From what a command is asked for to its exit code: what commands do alike.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but for some inputs, 130 or 143 interrupted. It does not know
command lines.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack

import torch

from engine._backends.sampling import ask_hardware, sampling_backend
from engine.core.exits import DONE, USAGE, exit_code
from engine.core.progress import Progress
from engine.core.runtime import AUTO, UNSEEN_GPU, choose_device, explain_dtype, hardware_of
from engine.generation.cost import plan_table
from engine.generation.inpaint import InpaintJob, redo
from engine.generation.outputs import guide_level
from engine.generation.run import Job, run, settle_run


def finish(prog: str, prepared: Callable[[], Job | InpaintJob], progress: Progress, plan_only: bool = False) -> int:
    """Plan and make a picture, or a part of one again; print what became of it and return the exit code."""
    jobs: list[Job | InpaintJob] = []

    def work() -> int:
        with ExitStack() as connection:  # Ray is left after the report, whose scores are metrics too
            try:
                job = prepared()
            except ValueError as error:  # the command asks for what this model, run or picture has not
                say(f"{prog}: {error}")
                return USAGE
            jobs.append(job)
            if plan_only and isinstance(job, Job):
                sys.stdout.write(plan_of(job) + "\n")
                return DONE
            start = sampling_backend(job.config, connection)
            ask = ask_hardware(job.config)
            folder = run(job, start, progress, ask) if isinstance(job, Job) else redo(job, start, progress)
        plan = job.plan if isinstance(job, Job) else job.job.plan
        what = "the canvas" if guide_level(plan) is None else "canvas and guide side by side"
        sys.stdout.write(f"The pictures are in {folder}: preview.png shows {what}.\n")
        return DONE

    def kept() -> str:
        job = jobs[0] if jobs else None
        store = job.config.canvas.store if isinstance(job, Job) else None  # a region's latents lie in its folder
        where = "the run folder" if job is None else store or job.folder
        return f"Every finished step is in {where}; run the same command again to continue."

    def say(text: str) -> None:
        progress.close()
        progress.say(text)

    return exit_code(prog, work, kept, say)


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
