"""How fast are bags from files learnt, does memory grow with the cohort, and how long does a heatmap take?

    python -m benchmarks.mil.mil [--slides 32] [--tiles 4000] [--width 512] [--epochs 3] [--threads 1] [--heatmap 50000]
                             [--json FILE]

Speed, seconds per epoch of one gated ABMIL, same steps and sizes, one after the other (A B C A B C ...), medians:

A  plain torch: all bags as float32 tensors in memory, rows drawn by torch.randperm, AdamW, no schedule, no validation.
B  `mil.fit.training.BagTraining` on bags in files that fit into the cache.
C  the same with a cache of nothing: every bag is read from its file in every epoch.

B/A is to be at most 1.2. Memory: the peak of one epoch of C in a process of its own, at the size asked for and at four
times as many slides; the difference is to be at most a tenth of the features added. Heatmap: the whole command, from
its start to PNG and GeoJSON, for a tested slide of `--heatmap` tiles with a thumbnail; at most 10 s.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, this is not the project's folder

from benchmarks.support.arguments import figures_parser, write_json
from benchmarks.support.peak import peak_mb
from mil.data.dataset import BagCache, StoredBag
from mil.fit.training import BagTraining, Part, TrainingConfig
from mil.models import ModelConfig, build_model

INSTANCES, BATCH = 2048, 4
TARGET = 1.2
HEATMAP_S = 10
ROOT = Path(__file__).resolve().parents[2]


def write_features(folder: Path, slides: int, tiles: int, width: int) -> None:
    """Write files as CLAM does: one table of features in chunks of 32 rows."""
    rng = np.random.default_rng(0)
    block = rng.normal(size=(tiles, width)).astype(np.float32)
    for number in range(slides):
        with h5py.File(folder / f"s{number:04d}.h5", "w") as file:
            file.create_dataset("features", data=np.roll(block, number, axis=0), chunks=(32, width))


def stored(folder: Path, width: int, cache_bytes: int) -> Part:
    """Return the bags of a folder, every second one positive."""
    cache = BagCache(cache_bytes)
    bags = [StoredBag(path, ("20x",), (width,), cache) for path in sorted(folder.glob("*.h5"))]
    labels = np.arange(len(bags)) % 2
    return Part(bags, labels, np.arange(len(bags)))


def training_of(part: Part, width: int, epochs: int) -> BagTraining:
    """Return a training that is ready to start."""
    torch.manual_seed(0)
    model = build_model(ModelConfig("abmil", (width,)))
    config = TrainingConfig(epochs=epochs, batch_size=BATCH, instances=INSTANCES)
    return BagTraining(model, config, part, 0, torch.device("cpu"))


def plain_epoch(part: Part, width: int) -> Callable[[int], None]:
    """Return an epoch written without anything of mil but the network."""
    tensors = [torch.from_numpy(np.asarray(bag.read(), np.float32)) for bag in part.bags]
    labels = torch.from_numpy(part.labels).float()
    torch.manual_seed(0)
    model = build_model(ModelConfig("abmil", (width,))).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=1e-4)

    def epoch(number: int) -> None:
        del number
        for chosen in torch.randperm(len(tensors)).split(BATCH):
            rows = [tensors[i][torch.randperm(len(tensors[i]))[:INSTANCES]] for i in chosen.tolist()]
            x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.arange(x.shape[1])[None] < torch.tensor([len(r) for r in rows])[:, None]
            loss = model.loss(x, mask, labels[chosen], torch.ones(len(chosen)))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()

    return epoch


def measure_speed(folder: Path, width: int, epochs: int) -> dict[str, float]:
    """Return the median seconds of an epoch each way, after one epoch of each to warm up."""
    everything = stored(folder, width, 2**40)
    kinds: dict[str, Callable[[int], object]] = {
        "plain": plain_epoch(everything, width),
        "cached": training_of(everything, width, epochs + 1)._epoch,
        "streamed": training_of(stored(folder, width, 0), width, epochs + 1)._epoch,
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(epochs + 1):
        for name, epoch in kinds.items():
            start = time.perf_counter()
            epoch(number)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def epoch_peak_mb(folder: Path, width: int) -> float:
    """Return the peak of a process that does one streamed epoch, in MB (10⁶ bytes)."""
    part = stored(folder, width, 0)
    training_of(part, width, 1)._epoch(0)
    return peak_mb()


def measure_memory(parent: Path, slides: int, tiles: int, width: int) -> dict[str, float]:
    """Return the peaks at `slides` and four times as many, and the megabytes of features added."""
    peaks = []
    for count in (slides, 4 * slides):
        folder = parent / f"memory{count}"
        folder.mkdir()
        write_features(folder, count, tiles, width)
        command = [sys.executable, "-m", "benchmarks.mil.mil", "--peak-of", str(folder), "--width", str(width)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        peaks.append(float(done.stdout))
    return {"peak_mb": peaks[0], "peak_4x_mb": peaks[1], "added_mb": 3 * slides * tiles * width * 4 / 1e6}


def heatmap_seconds(run: Path, tiles: int) -> float:
    """Return how long `python -m mil.heatmap` takes for a slide of so many tiles, its imports included."""
    fold, thumbnails = run / "folds" / "repeat0_fold0", run / "thumbnails"
    fold.mkdir(parents=True)
    thumbnails.mkdir()
    side = math.ceil(math.sqrt(tiles))
    attention = np.random.default_rng(0).dirichlet(np.full(tiles, 0.1)).astype(np.float32)
    with h5py.File(fold / "attention.h5", "w") as file:
        group = file.create_group("slide")
        group["attention"] = attention
        group["coords"] = np.stack(np.divmod(np.arange(tiles), side), axis=1)[:, ::-1] * 512
        group.attrs.update({"tile_level0_px": (512.0, 512.0), "level0_size": (side * 512, side * 512)})
    Image.new("RGB", (2048, 2048), (230, 180, 210)).save(thumbnails / "slide.jpg")
    picture = str(thumbnails / "slide.jpg")
    command = [sys.executable, "-m", "mil.heatmap", str(run), "--slide", "slide", "--picture", picture]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - start


def main(argv: Sequence[str]) -> int:
    """Measure, print, and say by the exit code whether the targets are met."""
    parser = figures_parser(__file__, __doc__)
    defaults = {"slides": 32, "tiles": 4000, "width": 512, "epochs": 3, "threads": 1, "heatmap": 50_000}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak_of is not None:
        print(epoch_peak_mb(args.peak_of, args.width))
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "speed"
        folder.mkdir()
        write_features(folder, args.slides, args.tiles, args.width)
        speed = measure_speed(folder, args.width, args.epochs)
        memory = measure_memory(Path(place), args.slides, args.tiles, args.width)
        heatmap_s = heatmap_seconds(Path(place) / "run", args.heatmap)
    ratio = speed["cached"] / speed["plain"]
    growth = memory["peak_4x_mb"] - memory["peak_mb"]
    result = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "peak_of")},
        "seconds_per_epoch": speed,
        "cached_over_plain": ratio,
        "streamed_over_plain": speed["streamed"] / speed["plain"],
        "memory": memory,
        "growth_mb": growth,
        "heatmap_s": heatmap_s,
    }
    print(json.dumps(result, indent=1))
    write_json(args.json, result)
    return int(ratio > TARGET or growth > 0.1 * memory["added_mb"] or heatmap_s > HEATMAP_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
