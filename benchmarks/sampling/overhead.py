"""What does Ray cost? One replica behind the pool against the same batches in this process.

    python -m benchmarks.sampling.overhead [--size 1024] [--threads 2] [--pairs 3] [--json FILE]

Pairs of runs of the demo, one after the other (A B A B ...), so that a machine that gets slower meets both:

A  the pool run: wall seconds of sample_large and of decoding to image.ome.zarr, pyramid and guide.png included, with
   ONE replica behind DenoiserPool. Noise, averaging, guidance, canvas, fsync and everything that Ray does are in it.
   Ray's start and the replica's start (process, imports, weights) are measured apart.
B  the pure compute: the same run with LocalDenoiser in this process, without Ray; only the seconds inside
   `denoise_batch` and `decode_batch` count.

Both use the same threads and are warmed up by a run of one step, which also fills their memory of contexts. The
ratio A/B is to be at most 1.05. Beside it: A's wall over what its own replica computed (the same minutes, so other
load on the machine hardly matters), and A's share of time not spent waiting for the replica. The pictures must be
equal byte for byte, or the batches were not the same: exit code 1.

Then the driver's peak memory, see benchmarks.sampling.memory (--no-memory leaves it out, --no-time the pairs).
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, this is not the project's folder

from actors.cluster import connect
from actors.pool import DenoiserPool
from benchmarks.sampling import memory
from benchmarks.support.arguments import figures_parser, write_json
from benchmarks.support.bare import BareRun, demo_config, maps_for, picture_digest
from engine.core.cli import PROJECT_ROOT
from engine.core.config import RayConfig
from engine.core.progress import Clock
from engine.core.runtime import keep_freed_memory, pin_arithmetic
from engine.model.zoomldm import ZoomLDM
from engine.sampling.denoiser import (
    DecodeBatch,
    DecodedBatch,
    EncodeBatch,
    EncodedBatch,
    LocalDenoiser,
    TileBatch,
    TilePrediction,
)
from engine.training.demo.stages import model_config
from engine.training.settings import ModelSettings

TARGET_RATIO = 1.05


class StoppedDenoiser:
    """LocalDenoiser with a stopwatch around the evaluation of each batch and nothing else."""

    def __init__(self, model: ZoomLDM) -> None:
        self._local = LocalDenoiser(model)
        self.seconds = 0.0
        self.batches = 0

    def denoise(self, batches: Iterable[TileBatch]) -> Iterator[TilePrediction]:
        return (self._timed(self._local.denoise_batch, batch) for batch in batches)

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        return (self._timed(self._local.decode_batch, batch) for batch in batches)

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        return (self._timed(self._local.encode_batch, batch) for batch in batches)

    def _timed(self, evaluate: Callable, batch: TileBatch | DecodeBatch | EncodeBatch):  # noqa: ANN202 (either kind of answer)
        start = time.perf_counter()
        answer = evaluate(batch)
        self.seconds += time.perf_counter() - start
        self.batches += 1
        return answer


@dataclass(frozen=True)
class Measured:
    """One run of either kind, in seconds."""

    wall_s: float
    waited_s: float
    """Part of the wall time in which the coordinator waited for answers."""
    compute_s: float
    """Inside the evaluation of batches."""
    batches: int
    digest: str
    """Of the picture."""


def warmed(run: BareRun, denoiser: object, counts: Callable[[], tuple[float, int]]) -> Measured:
    """Run one step for warmth, then the whole; `counts` reads the seconds computed and the batches so far."""
    with tempfile.TemporaryDirectory() as folder:
        run.first_steps(1).go(Path(folder) / "warm", denoiser)  # type: ignore[arg-type]
        seconds, batches = counts()
        timing = run.go(Path(folder) / "run", denoiser)  # type: ignore[arg-type]
        after_s, after = counts()
        waited = timing.sampling_waited_s + timing.decoding_waited_s
        digest = picture_digest(Path(folder) / "run")
    return Measured(timing.wall_s, waited, after_s - seconds, after - batches, digest)


def pool_run(run: BareRun, model: ZoomLDM, clock: Clock) -> Measured:
    """A: one replica behind the pool; the clock gets the phases "ray" and "replica"."""
    ray = RayConfig(address="local", replicas=1)
    with ExitStack() as stack:
        with clock.phase("ray"):
            stack.enter_context(connect(ray))
        with clock.phase("replica"):
            pool = stack.enter_context(DenoiserPool(model, ray, threads=run.config.model.threads, device="cpu"))
            pool.wait_ready()
        return warmed(run, pool, lambda: (pool.stats.compute_s, pool.stats.batches))


def pure_run(run: BareRun, model: ZoomLDM) -> Measured:
    """B: the same batches in this process."""
    local = StoppedDenoiser(model)
    return warmed(run, local, lambda: (local.seconds, local.batches))


def compare(run: BareRun, model: ZoomLDM, pairs: int, say: Callable[[str], None]) -> dict[str, object]:
    """Measure A and B in turn; return the figures."""
    rows, clock, digests = [], Clock(), set()
    for number in range(pairs):
        a, b = pool_run(run, model, clock), pure_run(run, model)
        digests |= {a.digest, b.digest}
        row = {
            "pool_wall_s": a.wall_s,
            "pure_compute_s": b.compute_s,
            "ratio": a.wall_s / b.compute_s,
            "replica_compute_s": a.compute_s,
            "ratio_to_own_replica": a.wall_s / a.compute_s,
            "not_waiting_share": 1 - a.waited_s / a.wall_s,
            "local_wall_s": b.wall_s,
            "batches": [a.batches, b.batches],
        }
        rows.append(row)
        say(
            f"pair {number + 1}: pool {a.wall_s:.2f} s / compute {b.compute_s:.2f} s = {row['ratio']:.3f}; over its "
            f"own replica's {a.compute_s:.2f} s {row['ratio_to_own_replica']:.3f}; without Ray {b.wall_s:.2f} s; "
            f"{a.batches} batches"
        )
    return {
        "pairs": rows,
        "median_ratio": statistics.median(r["ratio"] for r in rows),
        "median_ratio_to_own_replica": statistics.median(r["ratio_to_own_replica"] for r in rows),
        "target_ratio": TARGET_RATIO,
        "ray_start_s": clock.seconds["ray"] / pairs,
        "replica_start_s": clock.seconds["replica"] / pairs,
        "same_bytes": len(digests) == 1,
    }


def load(kind: str, dtype: str) -> ZoomLDM:
    """Return the demo model, or "random" weights in its architecture, which cost the same."""
    if kind == "demo":
        model = ZoomLDM.from_pretrained("demo", dtype=getattr(torch, dtype))
    else:
        sizes = yaml.safe_load((PROJECT_ROOT / "configs" / "train_demo.yaml").read_text())["model"]
        torch.manual_seed(0)
        model = ZoomLDM(model_config(ModelSettings(**sizes))).to(dtype=getattr(torch, dtype))
    return model.requires_grad_(False).channels_last()


def measure_time(arguments: argparse.Namespace) -> dict[str, object]:
    """Run the pairs that the command line asks for."""
    settings = {"sampling.stride": 1000 // arguments.steps, "model.threads": arguments.threads}
    config = demo_config(arguments.size, settings | {"output.formats": "[]"})
    pin_arithmetic(arguments.threads)
    keep_freed_memory("cpu")  # as replicas do
    model = load(arguments.model, config.model.dtype)
    maps = maps_for(config, model, LocalDenoiser(model))
    run = BareRun.of(config, model.config.scale, model.config.ssl_dim, maps)
    found = compare(run, model, arguments.pairs, partial(print, flush=True))  # a pair takes minutes
    print(
        f"median ratio {found['median_ratio']:.3f} (target {TARGET_RATIO}), over its own replica "
        f"{found['median_ratio_to_own_replica']:.3f}; Ray starts in {found['ray_start_s']:.1f} s, the replica in "
        f"{found['replica_start_s']:.1f} s; pictures equal: {found['same_bytes']}"
    )
    facts = {"size_px": arguments.size, "steps": len(run.plan.finest_pass.steps), "threads": arguments.threads}
    return facts | {"model": arguments.model, "dtype": config.model.dtype, "torch": torch.__version__} | found


def main(argv: list[str]) -> int:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--size", type=int, default=1024, help="px of the canvas of the pairs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="of the replica, and of this process when it computes")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--model", choices=("demo", "random"), default="demo")
    parser.add_argument("--no-time", action="store_true", help="only memory")
    parser.add_argument("--no-memory", action="store_true", help="only time")
    arguments = parser.parse_args(argv)
    found: dict[str, object] = {"machine": f"{platform.system()} {platform.machine()}"}
    if not arguments.no_time:
        found["time"] = measure_time(arguments)
    if not arguments.no_memory:
        found["memory"] = memory.compare(memory.SIZES, memory.FORMATS, 50, partial(print, flush=True))
    write_json(arguments.json, found)
    same = found.get("time", {}).get("same_bytes", True)  # type: ignore[attr-defined]
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
