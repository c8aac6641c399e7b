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
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

try:
    from engine.arguments import parse, parse_with_flags, take
    from engine.config import RunConfig
    from engine.devices import Hardware
    from engine.errors import EngineError
    from engine.model.zoomldm import ZoomLDM
    from engine.outcome import finish
    from engine.past import PastRun
    from engine.progress import Progress
    from engine.ray_address import announce_address
    from engine.redo import RedoConfig, prepare_redo, run_config
    from engine.run import Crew, prepare
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
FLAGS = {"plan": "print tiles, batches, network calls, FLOP, memory, disk, dtype and an estimated time, and stop"}


def main(argv: Sequence[str]) -> int:
    """Parse, plan, run; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    progress = Progress()
    if not any(word.partition("=")[0] == "--redo" for word in argv):
        config, flags = parse_with_flags(argv, RunConfig, PROG, DESCRIPTION, FLAGS)
        return finish(PROG, lambda: prepare(config), on_ray, ask_ray, progress, plan_only="plan" in flags)
    own, rest = take(argv, RedoConfig)
    asked = parse(own, RedoConfig, PROG, DESCRIPTION, first="run")
    try:
        past = PastRun(Path(asked.run))
        config = run_config(asked, past, rest, PROG)
    except EngineError as error:
        progress.say(f"{PROG}: {error}")
        return 1
    return finish(PROG, lambda: prepare_redo(asked, past, config), on_ray, ask_ray, progress)


def on_ray(connection: ExitStack, model: ZoomLDM, config: RunConfig) -> AbstractContextManager[Crew]:
    """Compute on the replicas of a Ray cluster, or of a private Ray."""
    announce_address(config.ray.address)
    from actors.crew import work_on_ray  # Ray is imported only by runs that use it

    return work_on_ray(connection, model, config)


def ask_ray(config: RunConfig) -> Hardware:
    """Find out what the replicas of a Ray cluster, or of a private Ray, compute on."""
    announce_address(config.ray.address)
    from actors.hardware import hardware_of_replicas

    return hardware_of_replicas(config.ray, config.model.device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
