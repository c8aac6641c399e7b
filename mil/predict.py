"""Judge slides with a trained study: calibrated probabilities, mean of its folds.

    python -m mil.predict runs/mil/hrd --features features
    python -m mil.predict runs/mil/hrd/folds/repeat0_fold0 --features features --out predictions.csv

Slides of the study itself are judged by folds that have seen them; their honest probabilities are in the folds'
predictions.csv. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but for slides without tiles (they are listed).
"""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from engine.arguments import parse
from engine.errors import EngineError
from engine.state import write_atomically
from mil.cohort import check_scales
from mil.dataset import BagCache, StoredBag
from mil.featurefiles import find_features, joined_rows, open_features
from mil.saved import SavedFold, load_models

PROG = "python -m mil.predict"
NO_TILES = "no tiles"


@dataclass(frozen=True)
class PredictConfig:
    """Which model judges which features."""

    model: str
    """Run folder of mil.train, or one fold's folder in it; may be given first, without --model."""
    features: str
    """Folder of features files, made with the model's encoder and scales."""
    out: str = "predictions.csv"
    """Table to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes."""
    threads: int = 1
    """CPU threads."""


def predict(config: PredictConfig) -> tuple[Path, int]:
    """Write the table; return where, and how many slides have no tiles. Raises EngineError."""
    torch.set_num_threads(config.threads)
    folds = load_models(Path(config.model), config.device)
    files = find_features(Path(config.features))
    rows = [judge_slide(folds, path) for _, path in sorted(files.items())]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = Path(config.out)
    write_atomically(path, table.getvalue().encode())
    return path, sum(row["note"] == NO_TILES for row in rows)


def judge_slide(folds: Sequence[SavedFold], path: Path) -> dict[str, object]:
    """Return one row: the mean probability of the folds, how far they disagree, and the call."""
    facts = folds[0].facts
    file = open_features(path)
    check_scales(path, file.scales, facts.scales)
    folds[0].check(file)
    widths = tuple(file.shape(scale)[1] for scale in facts.scales)
    count = len(joined_rows(file, facts.scales)[0])
    file.close()
    row: dict[str, object] = {"slide": path.stem, "probability": "", "fold_deviation": "", "threshold": "", "call": "",
                              "instances": count, "note": NO_TILES}  # fmt: skip
    if not count:
        return row
    bag = StoredBag(path, facts.scales, widths, BagCache(2**40))  # read once for all folds, then let go
    found = np.array([fold.classifier.predict_proba([bag])[0, 1] for fold in folds])
    threshold = float(np.mean([fold.classifier.threshold_ for fold in folds]))
    probability = float(found.mean())
    return row | {
        "probability": f"{probability:.6f}",
        "fold_deviation": f"{found.std():.6f}",
        "threshold": f"{threshold:.6f}",
        "call": facts.classes[int(probability >= threshold)],
        "note": "",
    }


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, PredictConfig, PROG, (__doc__ or "").splitlines()[0], first="model")
    try:
        path, empty = predict(config)
    except EngineError as error:
        sys.stderr.write(f"mil.predict: {error}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    if empty:
        sys.stderr.write(f"mil.predict: {empty} slides have no tiles and no probability; the column note names them.\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
