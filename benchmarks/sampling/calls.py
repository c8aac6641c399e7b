"""What does a batch cost the driver in Ray? The real pool, and replicas that do nothing.

    python -m benchmarks.sampling.calls [--batches 400] [--json FILE]

Two replicas on a private Ray of two CPUs, two batches in flight each, of the size that benchmarks.sampling.scaling uses
(16 tiles, one SSL vector of 1024 each; 0.85 MB there, 0.8 MB back). Between the first answer after a warm-up and the
last: processor time of the driver per batch, of its main thread and of all its threads (Ray's own in C++ among them),
and seconds of the wall. What the pool does for a batch is in it: queueing, waiting, checking the answer for its shape
and for numbers that are not finite, copying it out of Ray's store. The main thread's time is what keeps the loop from
other work: `call_s` of benchmarks.sampling.scaling.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from actors import replica
from actors.cluster import connect
from actors.denoiser_actor import Answer, DenoiserActor
from actors.pool import DenoiserPool
from benchmarks.sampling.scaling import SSL_DIM
from benchmarks.support.arguments import figures_parser
from engine.core.config import RayConfig
from engine.core.units import LATENT_CHANNELS, TILE_LATENT_PX
from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.sampling.denoiser import TileBatch, TilePrediction

WARM = 100
"""Batches before the stopwatch: Ray's store touches its memory for the first time."""


class IdleActor(DenoiserActor):
    """A replica that answers x_t."""

    def denoise(self, batch: TileBatch, float32: bool = False) -> Answer:
        return Answer(TilePrediction(batch.key, batch.x_t.copy()), 0.0)


def tile_batches(count: int, size: int = 16) -> Iterator[TileBatch]:
    """Yield batches of `size` tiles; making them costs nothing."""
    draw = np.random.default_rng(0)
    x_t = draw.standard_normal((size, LATENT_CHANNELS, TILE_LATENT_PX, TILE_LATENT_PX), dtype=np.float32)
    cells = draw.standard_normal((size, SSL_DIM, 1, 1), dtype=np.float32)
    first = TileBatch("calls/0", tuple(range(size)), x_t, 501, 0.3, cells, 0, 0.0)
    for number in range(count):
        yield replace(first, key=f"calls/{number}")


def measure(batches: int) -> dict[str, float]:
    """Return seconds per batch."""
    ray = RayConfig(address="local", replicas=2)
    replica.DenoiserActor, before = IdleActor, replica.DenoiserActor
    try:
        with connect(ray, num_cpus=2), DenoiserPool(ZoomLDM(tiny_config()), ray, device="cpu") as pool:
            pool.wait_ready(2)
            clocks = time.thread_time, time.process_time, time.perf_counter
            start = [0.0] * len(clocks)
            for number, _ in enumerate(pool.denoise(tile_batches(WARM + batches)), 1):
                if number == WARM:
                    start = [clock() for clock in clocks]
            spent = [(clock() - begun) / batches for clock, begun in zip(clocks, start, strict=True)]
    finally:
        replica.DenoiserActor = before
    return dict(zip(("main_thread_s", "all_threads_s", "wall_s"), spent, strict=True))


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--batches", type=int, default=400)
    a = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(a.batches)
    print(json.dumps(found))
    if a.json:
        a.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
