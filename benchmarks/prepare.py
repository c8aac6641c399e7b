"""How fast is a training set prepared, who holds it up, and how much memory does a large slide take?

    python -m benchmarks.prepare [--crew alone|ray] [--slides 2] [--size 2560] [--threads 1] [--json FILE]
    python -m benchmarks.prepare --memory 60000 [--crew alone|ray]

First form: phantom slides and the embedded model's autoencoder and SSL encoder; patches and SSL cells per second, and
the seconds of each stage. Second form: one slide of that many px on each side, glass but for a piece of tissue, with
`min_tissue` so low that patches of all eight magnifications cover it, and the peak of the memory of all processes
together (proportional set size, looked at four times a second). Target: 3 GiB. Linux only.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, this is not the project's folder

from benchmarks.features import watched_memory, write_glass
from engine.preparation import prepare
from engine.preparation_blocks import PrepareStages
from engine.preparation_config import PrepareConfig
from engine.prepared import PreparedSet
from engine.progress import Progress
from engine.slide_crew import Crew, work_alone
from engine.slide_report import DONE
from engine.slides.phantom import Phantom
from engine.slides.phantom_slide import write_phantom_slide

LITTLE_TISSUE = 2e-4
"""Of a patch at 0.15625x on the large slide, 0.4 % is tissue."""


@contextmanager
def prepare_on_ray(stages: PrepareStages) -> Iterator[Crew]:
    """Compute on a private Ray, as the command does."""
    from actors.cluster import connect
    from actors.slide_pipeline import work_on_ray

    with connect(stages.config.ray):
        yield work_on_ray(stages)


CREWS = {"alone": work_alone, "ray": prepare_on_ray}


def measure(config: PrepareConfig, crew: str) -> dict[str, object]:
    """Prepare once; return counts, speeds and the peak of memory."""
    with watched_memory() as seen:
        records = prepare(config, CREWS[crew], Progress())
    assert all(record.status == DONE for record in records), records
    report, found = json.loads((Path(config.out) / "report.json").read_text()), PreparedSet(config.out)
    patches = sum(found.count(level) for level in range(len(found.magnifications)))
    arrays = [np.load(path, mmap_mode="r")[..., 0] for path in Path(config.out).glob("slides/*/cells.npy")]
    cells = sum(int(np.isfinite(array).sum()) for array in arrays)
    return {
        "patches": {name: found.count(level) for level, name in enumerate(found.magnifications)},
        "ssl_cells": cells,
        "patches_per_s": round(patches / report["working_s"], 2),
        "cells_per_s": round(cells / report["working_s"], 2),
        "working_s": report["working_s"],
        "stage_seconds": {name: stage["seconds"] for name, stage in report["stages"].items()},
        "model_waited_share": report["model_waited_share"],
        "peak_gib": round(max(seen) / 2**30, 3),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crew", choices=sorted(CREWS), default="alone")
    parser.add_argument("--slides", type=int, default=2)
    parser.add_argument("--size", type=int, default=2560, help="px of each side of a slide")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=int, help="px of each side of the one large slide")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = PrepareConfig(str(folder / "slides"), str(folder / "out"))
        config = replace(config, model=replace(config.model, device="cpu", dtype="float32", threads=args.threads))
        (folder / "slides").mkdir()
        result: dict[str, object] = {"crew": args.crew, "threads": args.threads, "px": args.memory or args.size}
        if args.memory:
            config = replace(config, min_tissue=LITTLE_TISSUE)
            write_glass(folder / "slides" / "large.tif", args.memory)
        else:
            for seed in range(args.slides):
                write_phantom_slide(folder / "slides" / f"{seed}.tiff", Phantom(seed), args.size, args.size)
        result |= measure(config, args.crew)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
