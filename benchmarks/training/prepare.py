"""How fast is a training set prepared, who holds it up, and how much memory does a large slide take?

    python -m benchmarks.training.prepare [--backend alone|ray] [--slides 2] [--size 2560] [--threads 1] [--json FILE]
    python -m benchmarks.training.prepare --memory 60000 [--backend alone|ray]

First form: phantom slides and the embedded model's autoencoder and SSL encoder; patches and SSL cells per second, and
the seconds of each stage. Second form: one slide of that many px on each side, glass but for a piece of tissue, with
`min_tissue` so low that patches of all eight magnifications cover it, and the peak of the memory of all processes
together (proportional set size, looked at four times a second). Target: 3 GiB. Linux only.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, this is not the project's folder

from benchmarks.features.features import watched_memory, write_glass
from benchmarks.support.arguments import figures_parser, write_json
from engine._backends.slides import prepare_on_ray
from engine.core.progress import Progress
from engine.datasets.config import PrepareConfig
from engine.datasets.dataset import PreparedSet
from engine.datasets.prepare import prepare
from engine.pipeline.report import SLIDE_DONE
from engine.pipeline.stages import local_backend
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.slide import write_phantom_slide

LITTLE_TISSUE = 2e-4
"""Of a patch at 0.15625x on the large slide, 0.4 % is tissue."""
BACKENDS = {"alone": local_backend, "ray": prepare_on_ray}


def measure(config: PrepareConfig, backend: str) -> dict[str, object]:
    """Prepare once; return counts, speeds and the peak of memory."""
    with watched_memory() as seen:
        records = prepare(config, BACKENDS[backend], Progress())
    assert all(record.status == SLIDE_DONE for record in records), records
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
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="alone")
    parser.add_argument("--slides", type=int, default=2)
    parser.add_argument("--size", type=int, default=2560, help="px of each side of a slide")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=int, help="px of each side of the one large slide")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = PrepareConfig(str(folder / "slides"), str(folder / "out"))
        config = replace(config, model=replace(config.model, device="cpu", dtype="float32", threads=args.threads))
        (folder / "slides").mkdir()
        result: dict[str, object] = {"backend": args.backend, "threads": args.threads, "px": args.memory or args.size}
        if args.memory:
            config = replace(config, min_tissue=LITTLE_TISSUE)
            write_glass(folder / "slides" / "large.tif", args.memory)
        else:
            for seed in range(args.slides):
                write_phantom_slide(folder / "slides" / f"{seed}.tiff", Phantom(seed), args.size, args.size)
        result |= measure(config, args.backend)
    print(json.dumps(result, indent=1))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
