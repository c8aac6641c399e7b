"""Judge slides with a trained study: calibrated probabilities, mean of its folds.

    python -m mil.predict runs/mil/hrd --features features
    python -m mil.predict runs/mil/hrd/folds/repeat0_fold0 --features features --out predictions.csv

Of more than two classes the table has one probability per class. Slides of the study itself are judged by folds that
have seen them; their honest probabilities are in the folds' predictions.csv. Exit codes: 0 done, 1 failed, 2 wrong
usage, 3 done but for slides without tiles (they are listed).
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

from engine.core.cli import parse
from engine.core.exits import DONE, PARTLY, exit_code, say
from engine.core.files import write_atomically
from mil.data.feature_files import find_features
from mil.fit.store import SavedFold, load_models

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
    classes = folds[0].facts.classes
    bag, count = folds[0].bag(path)  # read once for all folds, then let go
    binary = len(classes) == 2
    columns = ["probability"] if binary else [f"probability_{name}" for name in classes]
    columns += ["fold_deviation", *(["threshold"] if binary else []), "call"]
    row: dict[str, object] = {"slide": path.stem, **dict.fromkeys(columns, ""), "instances": count, "note": NO_TILES}
    if not count:
        return row
    found = np.array([fold.classifier.predict_proba([bag])[0] for fold in folds])
    if not binary:
        mean, spread = found.mean(axis=0), found.std(axis=0)
        best = int(mean.argmax())
        told = {f"probability_{name}": f"{p:.6f}" for name, p in zip(classes, mean, strict=True)}
        return row | told | {"fold_deviation": f"{spread[best]:.6f}", "call": classes[best], "note": ""}
    found = found[:, 1]
    threshold = float(np.mean([t for fold in folds if (t := fold.classifier.threshold_) is not None]))
    probability = float(found.mean())
    return row | {
        "probability": f"{probability:.6f}",
        "fold_deviation": f"{found.std():.6f}",
        "threshold": f"{threshold:.6f}",
        "call": classes[int(probability >= threshold)],
        "note": "",
    }


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(argv, PredictConfig, PROG, (__doc__ or "").splitlines()[0], first="model")

    def work() -> int:
        path, empty = predict(config)
        sys.stdout.write(f"{path}\n")
        if not empty:
            return DONE
        say(f"mil.predict: {empty} slides have no tiles and no probability; the column note names them.")
        return PARTLY

    return exit_code("mil.predict", work, lambda: "Nothing was written; run the same command again.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
