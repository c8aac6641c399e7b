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
from pathlib import Path

try:
    from engine._command import finish
    from engine.core.cli import parse, parse_with_flags, take
    from engine.core.errors import EngineError
    from engine.core.progress import Progress
    from engine.generation.finished_run import FinishedRun
    from engine.generation.inpaint import InpaintConfig, config_files, prepare_inpaint
    from engine.generation.run import prepare
    from engine.sampling.config import RunConfig
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
        return finish(PROG, lambda: prepare(config), progress, plan_only="plan" in flags)
    own, rest = take(argv, InpaintConfig)
    asked = parse(own, InpaintConfig, PROG, DESCRIPTION, first="run")
    try:
        finished = FinishedRun(Path(asked.run))
        config = parse([*config_files(asked, finished), *rest], RunConfig, PROG, "")
    except EngineError as error:
        progress.say(f"{PROG}: {error}")
        return 1
    return finish(PROG, lambda: prepare_inpaint(asked, finished, config), progress)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
