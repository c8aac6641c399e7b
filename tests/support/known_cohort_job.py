"""A cohort of a tiny random model: its model with an encoder and a CDM, two small slides, and the flags it takes."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.cohort.config import CohortConfig
from engine.core.cli import configured
from tests.support.documents_place import write_model, write_slide

PX = 1024
SHARED: dict[str, Any] = {
    "model.device": "cpu",
    "model.dtype": "float32",
    "model.threads": 1,
    "canvas.height": 256,
    "canvas.width": 320,
    "sampling.stride": 500,
    "sampling.weight": 0,
    "sampling.batch_size": 2,
    "decode.batch_size": 1,
    "finder.method": "everything",
    "cdm_steps": 2,
    "inversion.steps": 2,
    "ray.enabled": False,
}
"""Steps, sizes and places that make a picture of the tiny model in a second."""
BAGS: dict[str, Any] = {
    "bags_only": True,
    "bags.tiles": 6,
    "bags.steps": 2,
    "bags.scale": 1.0,
    "bags.encoders": ["texture"],
    "features.batch": 2,
}


def write_inputs(folder: Path) -> None:
    """Write the model as folder/model, two slides in folder/slides, and the vectors of a picture of two cells."""
    write_model(folder)
    np.save(folder / "cells.npy", np.random.default_rng(0).normal(size=(16, 1, 2)).astype(np.float32))
    for number in range(2):
        write_slide(folder / f"slides/s{number}.tiff", number, PX)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write a table; columns are those of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def job(inputs: Path, out: Path, rows: Sequence[Mapping[str, object]] | None = None, **changes: Any) -> CohortConfig:
    """Return the configuration of a cohort of these rows, or of a recipe where there are none."""
    keys = SHARED | {"model.source": str(inputs / "model"), "slides": str(inputs / "slides"), "out": str(out)}
    if rows is not None:
        out.mkdir(parents=True, exist_ok=True)
        keys["table"] = str(write_rows(out.with_name(out.name + "_rows.csv"), rows))
    return configured(CohortConfig, None, keys | {k.replace("__", "."): v for k, v in changes.items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
