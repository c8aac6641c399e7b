"""Command 1: one large, coherent picture from a ZoomLDM checkpoint.

    python generate_large.py --config configs/demo.yaml
    ray submit configs/cluster/local.yaml generate_large.py -- --config configs/brca.yaml --reference region.jpeg
    ray job submit --working-dir . -- python generate_large.py --config configs/brca.yaml --reference region.jpeg

`ray submit` copies this one file and runs it in the head's home folder, so it must not need its own folder: the
packages engine and actors come installed. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

try:
    from engine.arguments import parse_with_flags
    from engine.config import RunConfig
    from engine.errors import EngineError
    from engine.estimate import plan_table
    from engine.interruption import sigterm_as_exit
    from engine.model.zoomldm import ZoomLDM
    from engine.progress import Progress
    from engine.run import Crew, choose_device, prepare, run, work_alone
except ModuleNotFoundError as error:
    sys.exit(
        f"generate_large.py needs the packages of the project, installed in this Python ({sys.executable}); {error}.\n"
        "Install them here with `pip install -c constraints.txt -e .` in the project's folder; on a cluster, through "
        "the setup_commands of its YAML (configs/cluster/local.yaml)."
    )

DESCRIPTION = """Make one large, coherent picture from a ZoomLDM checkpoint. Run the same command again to continue an
interrupted run. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted."""
FLAGS = {"plan": "print tiles, batches, network calls, FLOP, memory, disk and an estimated time, and stop"}


def main(argv: Sequence[str]) -> int:
    """Parse, plan, run; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, flags = parse_with_flags(argv, RunConfig, "generate_large.py", DESCRIPTION, FLAGS)
    progress = Progress()
    try:
        # Ray is left after the report, whose scores are metrics too.
        with sigterm_as_exit(), ExitStack() as connection:
            try:
                job = prepare(config)
            except ValueError as error:  # the config asks for what this model has not
                progress.say(f"generate_large.py: {error}")
                return 2
            if "plan" in flags:
                device = "cuda" if config.model.device == "cuda" else choose_device(config.model.device)
                sys.stdout.write(plan_table(job.plan, config, job.model, device) + "\n")
                return 0
            folder = run(job, partial(work_on_ray, connection) if config.ray.enabled else work_alone, progress)
    except EngineError as error:
        progress.close()
        progress.say(f"generate_large.py: {error}")
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
    # The package actors looks there when it chooses how to authenticate, which must be before Ray is imported.
    if config.ray.address == "auto":
        os.environ.setdefault("RAY_ADDRESS", "auto")
    elif config.ray.address is not None:
        os.environ["RAY_ADDRESS"] = config.ray.address

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
