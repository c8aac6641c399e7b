"""From what a command is asked for to its exit code: what those that sample a canvas do alike.

It does not know command lines. Who computes on a cluster is the command's choice: the engine imports no Ray.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

from engine.config import RunConfig
from engine.devices import choose_device
from engine.errors import EngineError
from engine.estimate import plan_table
from engine.interruption import sigterm_as_exit
from engine.model.zoomldm import ZoomLDM
from engine.progress import Progress
from engine.redo import RedoJob, redo
from engine.run import Crew, Job, run, work_alone

EngageOnRay = Callable[[ExitStack, ZoomLDM, RunConfig], AbstractContextManager[Crew]]
"""Puts a model to work on Ray's replicas; Ray is left with the stack."""


def finish(
    prog: str,
    prepared: Callable[[], Job | RedoJob],
    on_ray: EngageOnRay,
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
                device = "cuda" if config.model.device == "cuda" else choose_device(config.model.device)
                sys.stdout.write(plan_table(job.plan, config, job.model, device) + "\n")
                return 0
            engage = partial(on_ray, connection) if config.ray.enabled else work_alone
            folder = run(job, engage, progress) if isinstance(job, Job) else redo(job, engage, progress)
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
