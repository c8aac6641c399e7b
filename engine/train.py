"""Train a small ZoomLDM on phantoms: python -m engine.train --config configs/train_demo.yaml

The same command continues a run that was killed. It only parses, calls and reports.
"""

import logging
import sys
from pathlib import Path

from engine.arguments import parse
from engine.errors import EngineError
from engine.training.run import train
from engine.training.settings import TrainingConfig

log = logging.getLogger("engine.train")


def main() -> int:
    config = parse(sys.argv[1:], TrainingConfig, "python -m engine.train", (__doc__ or "").partition("\n")[0])
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    form = logging.Formatter("%(asctime)s %(name)s %(message)s", "%H:%M:%S")
    for handler in (logging.StreamHandler(), logging.FileHandler(run / "log.txt")):
        handler.setFormatter(form)
        logging.getLogger("engine").addHandler(handler)
    logging.getLogger("engine").setLevel(logging.INFO)
    try:
        train(config)
    except EngineError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
