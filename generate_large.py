"""Command 1: one large, coherent picture from a ZoomLDM checkpoint.

    python generate_large.py --config configs/demo.yaml
    python generate_large.py --redo 512,256,300,300 --seed 1 runs/demo
    ray submit configs/cluster/local.yaml generate_large.py -- --config configs/brca.yaml --reference region.jpeg
    ray job submit --working-dir . -- python generate_large.py --config configs/brca.yaml --reference region.jpeg

`ray submit` copies this one file and runs it in the head's home folder, so it must not need its own folder: the
packages engine and actors come installed. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

try:
    from engine.arguments import parse, parse_with_flags, take
    from engine.config import RunConfig
    from engine.errors import EngineError
    from engine.estimate import plan_table
    from engine.interruption import sigterm_as_exit
    from engine.model.zoomldm import ZoomLDM
    from engine.past import PastRun
    from engine.progress import Progress
    from engine.ray_address import announce_address
    from engine.redo import RedoConfig, RedoJob, prepare_redo, redo, run_config
    from engine.run import Crew, Job, choose_device, prepare, run, work_alone
except ModuleNotFoundError as error:
    sys.exit(
        f"generate_large.py needs the packages of the project, installed in this Python ({sys.executable}); {error}.\n"
        "Install them here with `pip install -c constraints.txt -e .` in the project's folder; on a cluster, through "
        "the setup_commands of its YAML (configs/cluster/local.yaml)."
    )

PROG = "generate_large.py"
DESCRIPTION = """Make one large, coherent picture from a ZoomLDM checkpoint. Run the same command again to continue an
interrupted run. With --redo x,y,width,height --seed N [--from_t T] RUN, sample a region (px) of a finished run again,
noised back to timestep T (600 unless said), into a run folder beside it; other keys are as RUN has them. Exit codes: 0
done, 1 failed, 2 wrong usage, 130 or 143 interrupted."""
FLAGS = {"plan": "print tiles, batches, network calls, FLOP, memory, disk and an estimated time, and stop"}


def main(argv: Sequence[str]) -> int:
    """Parse, plan, run; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    progress = Progress()
    if not any(word.partition("=")[0] == "--redo" for word in argv):
        config, flags = parse_with_flags(argv, RunConfig, PROG, DESCRIPTION, FLAGS)
        return finish(config, lambda: prepare(config), progress, plan_only="plan" in flags)
    own, rest = take(argv, RedoConfig)
    asked = parse(own, RedoConfig, PROG, DESCRIPTION, first="run")
    try:
        past = PastRun(Path(asked.run))
        config = run_config(asked, past, rest, PROG)
    except EngineError as error:
        progress.say(f"{PROG}: {error}")
        return 1
    return finish(config, lambda: prepare_redo(asked, past, config), progress)


def finish(
    config: RunConfig, prepared: Callable[[], Job | RedoJob], progress: Progress, plan_only: bool = False
) -> int:
    """Plan and do the work, or a redo's; return the exit code."""
    try:
        # Ray is left after the report, whose scores are metrics too.
        with sigterm_as_exit(), ExitStack() as connection:
            try:
                job = prepared()
            except ValueError as error:  # the command asks for what this model or run has not
                progress.say(f"{PROG}: {error}")
                return 2
            if plan_only and isinstance(job, Job):
                device = "cuda" if config.model.device == "cuda" else choose_device(config.model.device)
                sys.stdout.write(plan_table(job.plan, config, job.model, device) + "\n")
                return 0
            engage = partial(work_on_ray, connection) if config.ray.enabled else work_alone
            folder = run(job, engage, progress) if isinstance(job, Job) else redo(job, engage, progress)
    except EngineError as error:
        progress.close()
        progress.say(f"{PROG}: {error}")
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:  # SIGTERM raises SystemExit
        progress.close()
        progress.say(
            f"Interrupted. Every finished step is in {config.canvas.store or config.output.folder}; run the same "
            "command again to continue."
        )
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    sys.stdout.write(f"The pictures are in {folder}: preview.png shows canvas and guide side by side.\n")
    return 0


@contextmanager
def work_on_ray(connection: ExitStack, model: ZoomLDM, config: RunConfig) -> Iterator[Crew]:
    """Compute on the replicas of a Ray cluster, or of a private Ray.

    The replicas leave with this context, so that nobody waits for exports on a GPU; Ray is left with `connection`.
    """
    announce_address(config.ray.address)
    from actors.cluster import connect  # Ray is imported only by runs that use it
    from actors.metrics import RunMetrics
    from actors.pool import DenoiserPool

    section = config.model
    connection.enter_context(connect(config.ray))
    metrics = RunMetrics(config.output.folder)
    with DenoiserPool(model, config.ray, threads=section.threads, device=section.device, watch=metrics) as pool:
        pool.wait_ready()

        def facts() -> dict[str, object]:
            stats = pool.stats
            return {
                "replicas": stats.replicas,
                "restarts": stats.restarts,
                "retries": stats.retries,
                "float32_retries": stats.float32_retries,
                "batches": stats.batches,
                "compute_s": round(stats.compute_s, 3),
            }

        yield Crew(pool, pool.replicas[0].device, lambda: pool.stats.replicas, facts, metrics)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
