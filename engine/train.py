"""Train a ZoomLDM, or the CDM of one: python -m engine.train --config configs/train_demo.yaml

The same command continues a run that was killed. It only parses, calls and reports.
"""

import logging
import sys
from pathlib import Path

from engine.arguments import parse, peek
from engine.errors import EngineError
from engine.training.tasks import TASKS

log = logging.getLogger("engine.train")


def main() -> int:
    argv, prog = sys.argv[1:], "python -m engine.train"
    task = TASKS[peek(argv, "task", list(TASKS), prog)]
    config = parse(argv, task.schema, prog, (__doc__ or "").partition("\n")[0])
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    form = logging.Formatter("%(asctime)s %(name)s %(message)s", "%H:%M:%S")
    for handler in (logging.StreamHandler(), logging.FileHandler(run / "log.txt")):
        handler.setFormatter(form)
        logging.getLogger("engine").addHandler(handler)
    logging.getLogger("engine").setLevel(logging.INFO)
    try:
        task.train(config)
    except EngineError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
