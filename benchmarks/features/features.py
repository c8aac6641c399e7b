"""How much of the model's speed does the extraction of features keep, who holds it up, how much memory does it take?

    python -m benchmarks.features.features [--backend alone|ray] [--slides 3] [--size 2560] [--rounds 3] \
        [--threads 2] [--json FILE]
    python -m benchmarks.features.features --memory 60000 [--backend alone|ray]

First form: phantom slides and the embedded model, in rounds that take turns, so that a machine that gets slower meets
both: the whole pipeline (read, encode both scales, write), and the same encoders fed with the same blocks from memory.
A figure is the median round. Targets: whole ≥ 0.90 of the tiles/s from memory; time of the whole ≤ 1.15 × the sum of
the model's times at 20x and at 5x. `processor` has the same figures in processor time of this process, which other work
on the machine hardly changes with --threads 1 (more threads wait for each other, busily): what they would be if nothing
ran beside anything. With --backend ray the model's times are those of one process, and --threads of each replica; only
the shares of the stages are then to be compared.

Second form: one slide of that many px on each side, glass but for a piece of tissue, and the peak of the memory of all
processes together (proportional set size, looked at four times a second). Target: 3 GiB. Linux only.
"""

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import tifffile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, this is not the project's folder

from benchmarks.support.arguments import figures_parser, write_json
from engine._backends.slides import extract_on_ray
from engine.core.progress import Progress
from engine.core.runtime import pin_arithmetic
from engine.features.blocks import BlockEncoder, BlockPixels, ExtractTask, SlideWorker, TileBlock
from engine.features.config import ExtractConfig
from engine.features.encoders import extract_alone, load_encoders, scale_names
from engine.features.extract import StartBackend, extract
from engine.features.tile_encoders import encode_all
from engine.pipeline.report import SLIDE_DONE
from engine.pipeline.stages import Backend, Message
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.slide import write_phantom_slide
from engine.slides.slide import find_slides, slide_name

TILE, FACTOR, PIECE = 256, 4, 2048
BACKENDS = {"alone": extract_alone, "ray": extract_on_ray}


@dataclass(frozen=True)
class Round:
    """Seconds of one round; tiles are of both scales."""

    tiles: int
    whole_s: float
    memory_s: float
    fine_s: float
    coarse_s: float
    stages: dict[str, dict[str, float]]
    model_waited_share: float
    processor: "Processor"


@dataclass(frozen=True)
class Processor:
    """The same in seconds of processor time of this process."""

    whole_s: float
    memory_s: float
    fine_s: float
    coarse_s: float


def shares(rounds: Sequence[Round | Processor]) -> dict[str, float]:
    """Return the two figures that have targets."""
    return {
        "share_of_model_from_memory": round(statistics.median(r.memory_s / r.whole_s for r in rounds), 3),
        "both_scales_over_sum_of_model_times": round(
            statistics.median(r.whole_s / (r.fine_s + r.coarse_s) for r in rounds), 3
        ),
    }


def figures(rounds: list[Round]) -> dict[str, object]:
    """Return the figures that have targets, and the stage that works longest per tile beside the model."""
    last = rounds[-1].stages
    return {
        "tiles": rounds[0].tiles,
        "tiles_per_s": round(statistics.median(r.tiles / r.whole_s for r in rounds), 2),
        **shares(rounds),
        "processor": shares([r.processor for r in rounds]),
        "model_waited_share": round(statistics.median(r.model_waited_share for r in rounds), 4),
        "ms_per_tile": {name: round(1000 / s["tiles_per_s"], 3) for name, s in last.items() if s["tiles_per_s"]},
        "bottleneck": max(last, key=lambda name: last[name]["seconds"]),
    }


def pixels_of(config: ExtractConfig) -> list[BlockPixels]:
    """Read all blocks of all slides into memory."""
    worker = SlideWorker(config, scale_names(config))
    tasks = [ExtractTask(slide_name(path), path, ({},)) for path in find_slides(Path(config.slides))]
    blocks = [b for task in tasks for b in worker.plan(task) if isinstance(b, TileBlock)]
    return [pixels for pixels in map(worker.read, blocks) if isinstance(pixels, BlockPixels)]


def measure(config: ExtractConfig, backend: str, rounds: int, out: Path) -> list[Round]:
    """Run all rounds, each into a folder of its own."""
    pin_arithmetic(config.model.threads)
    pixels, encoder = pixels_of(config), BlockEncoder(load_encoders(config, "cpu"))
    found = []
    for number in range(rounds):
        seconds = [_encode(pixels, encoder, scales) for scales in (("fine", "coarse"), ("fine",), ("coarse",))]
        here, spent = replace(config, out=str(out / str(number))), []
        records = extract(here, _counted(BACKENDS[backend], spent), Progress())
        assert all(record.status == SLIDE_DONE for record in records), records
        report = json.loads((out / str(number) / "report.json").read_text())
        (memory_s, memory_cpu_s), (fine_s, fine_cpu_s), (coarse_s, coarse_cpu_s) = seconds
        used = Processor(spent[0], memory_cpu_s, fine_cpu_s, coarse_cpu_s)
        stages, waited = report["stages"], report["model_waited_share"]
        found.append(Round(report["tiles"], report["working_s"], memory_s, fine_s, coarse_s, stages, waited, used))
    return found


def _encode(blocks: Sequence[BlockPixels], encoder: BlockEncoder, scales: Sequence[str]) -> tuple[float, float]:
    """Encode from memory; return the seconds by the clock and of the processor."""
    start, used = time.perf_counter(), time.process_time()
    for block in blocks:
        for scale in scales:
            encode_all(encoder.encoders, getattr(block, scale))
    return time.perf_counter() - start, time.process_time() - used


def _counted(start_backend: StartBackend, spent: list[float]) -> StartBackend:
    """Add to `spent` the processor's seconds from the first task to the last written block."""

    @contextmanager
    def counting(config: ExtractConfig, names: tuple[str, str]) -> Iterator[Backend[ExtractTask]]:
        with start_backend(config, names) as backend:

            def work(tasks: Sequence[ExtractTask], given_up: Collection[str] = ()) -> Iterator[Message]:
                used = time.process_time()
                yield from backend.work(tasks, given_up)
                spent.append(time.process_time() - used)

            yield replace(backend, work=work)

    return counting


def write_glass(path: Path, size: int) -> None:
    """Write a slide of size × size px at 0.5 µm/px: glass, and PIECE × PIECE px of tissue in its middle."""
    piece = Phantom(0).render(0.0, 0.0, PIECE, PIECE, 0.5)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level in range(4):
            px, factor = -(-size // FACTOR**level), FACTOR**level
            reduced = piece.reshape(PIECE // factor, factor, PIECE // factor, factor, 3).mean((1, 3)).astype(np.uint8)
            tiff.write(
                _glass_tiles(px, reduced),
                shape=(px, px, 3),
                dtype=np.uint8,
                photometric="rgb",
                tile=(TILE, TILE),
                compression="jpeg",
                subfiletype=1 if level else 0,
                resolution=(2e4 / factor, 2e4 / factor),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def _glass_tiles(px: int, piece: np.ndarray) -> Iterator[np.ndarray]:
    glass, n = np.full((TILE, TILE, 3), 245, np.uint8), -(-px // TILE)
    first, count = n // 2, -(-len(piece) // TILE)
    for row in range(n):
        for column in range(n):
            y, x = row - first, column - first
            tile = glass
            if 0 <= y < count and 0 <= x < count:
                part = piece[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE]
                tile = glass.copy()
                tile[: part.shape[0], : part.shape[1]] = part
            yield tile


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Collect, inside, the bytes of this process and all below it; shared pages are counted once."""
    seen, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.25):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it ended meanwhile
            seen.append(total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Parse, measure, print."""
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="alone")
    parser.add_argument("--slides", type=int, default=3)
    parser.add_argument("--size", type=int, default=2560, help="px of each side of a slide")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, help="px of each side of the one large slide")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = ExtractConfig(str(folder / "slides"), str(folder / "out"))
        config = replace(config, model=replace(config.model, device="cpu", dtype="float32", threads=args.threads))
        result: dict[str, object] = {"backend": args.backend, "threads": args.threads}
        (folder / "slides").mkdir()
        if args.memory:
            write_glass(folder / "slides" / "large.tif", args.memory)
            with watched_memory() as seen:
                records = extract(config, BACKENDS[args.backend], Progress())
            result |= {
                "px": args.memory,
                "peak_gib": round(max(seen) / 2**30, 3),
                "slides": [asdict(r) for r in records],
            }
        else:
            for seed in range(args.slides):
                write_phantom_slide(folder / "slides" / f"{seed}.tiff", Phantom(seed), args.size, args.size)
            result |= figures(measure(config, args.backend, args.rounds, folder / "out"))
    print(json.dumps(result, indent=1))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
