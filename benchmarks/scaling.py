"""How many replicas can one coordinator feed? The real coordinator and canvas, simulated replicas, a virtual clock.

    python -m benchmarks.scaling [--sizes 4096,16384] [--replicas 1,8,64,256] [--batch_s 0.2] [--slow 1] [--json FILE]

The coordinator's work (cutting, averaging, guidance, update, zarr, commit) is done and timed for real; a replica's is
not done: it takes `batch_s` of virtual time a batch. The virtual clock advances by what the coordinator really spent,
by `call_s` a batch for Ray's own work in the driver, and by waiting. Answers are those of the pointwise denoiser.
efficiency = compute time of all batches / (replicas × time that passed), where a slow replica counts by its speed;
steady_efficiency = the same between the first commit and the last but one, without the start and the end of the run;
busy = the coordinator's share of that time; saturates = the replicas that one coordinator can feed at all, the compute
time of a step over the coordinator's. On a machine that is busy with something else `--clock cpu` counts the
coordinator's processor time, all its threads together; waiting for the disk is then left out.
"""

import argparse
import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.work import nbytes
from benchmarks.bare import BareRun, demo_config
from benchmarks.memory import MAPS, SSL_DIM
from engine.magnification import BRCA_SCALE, LATENT_CHANNELS
from engine.pointwise import PointwiseDenoiser
from engine.predict import DecodeBatch, DecodedBatch, TileBatch, TilePrediction
from engine.replay import SilentWatch
from engine.sampler import sample_large
from engine.tiles import Plan

IN_FLIGHT = 2
"""Batches queued per replica, ray.in_flight's default."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class SimulatedReplicas:
    """DenoiseTiles with the pool's queueing and a clock of its own."""

    seconds: np.ndarray
    """(R,): seconds of a batch on each replica."""
    call_s: float
    """Driver seconds a batch costs in Ray."""
    barriers: bool = False
    """Hold the batches of a level's step back until the one before is wholly answered, for comparison."""
    clock: Callable[[], float] = time.perf_counter
    """What the coordinator's own work is timed by."""
    now: float = 0.0
    busy_s: float = 0.0
    batches: int = 0
    nbytes: int = 0
    _inner: PointwiseDenoiser = field(default_factory=PointwiseDenoiser)

    def __post_init__(self) -> None:
        self._finish: list[deque[float]] = [deque() for _ in self.seconds]
        self._mark = self.clock()

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        return self._answers(iter(batches), lambda batch: next(self._inner.denoise([batch])))

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        return self._answers(iter(batches), lambda batch: next(self._inner.decode([batch])))

    def start(self) -> None:
        """Begin to count the coordinator's time."""
        self._mark = self.clock()

    def coordinated(self) -> None:
        """Add what the coordinator spent since it got control."""
        spent = self.clock() - self._mark
        self.now, self.busy_s = self.now + spent, self.busy_s + spent

    def time(self) -> float:
        """Return the virtual time while the coordinator works."""
        return self.now + self.clock() - self._mark

    def _answers(self, source: Iterator[Any], answer_to: Callable[[Any], Any]) -> Iterator[Any]:
        """Yield answers in order, as the pool does: read ahead while a replica has room."""
        pending: deque[tuple[float, Any]] = deque()
        held: list[Any] = []
        more = True
        self.coordinated()
        while more or held or pending:
            while len(pending) < 2 * IN_FLIGHT * len(self._finish) and (at := self._room()) is not None:
                if more and not held:
                    held, more = self._ask(source)
                if (
                    not held
                    or held[0] is None
                    or (self.barriers and pending and _step(pending[-1][1]) != _step(held[0]))
                ):
                    held = [b for b in held if b is not None]
                    break
                batch = held.pop()
                pending.append((self._send(at, batch), answer_to(batch)))
            if pending and pending[0][0] <= self.now:
                _, answer = pending.popleft()
                self.start()
                yield answer
                self.coordinated()
            elif pending or more or held:
                self._wait(pending[0][0] if pending else math.inf)  # all may be busy with another run's batches
        self.start()

    def _ask(self, source: Iterator[Any]) -> tuple[list[Any], bool]:
        """Return the next batch, if there is one, and whether there may be more; the coordinator cuts it."""
        self.start()
        found = list(islice(source, 1))
        self.coordinated()
        return found, bool(found)

    def _room(self) -> int | None:
        """Return the least busy replica with room."""
        for finish in self._finish:
            while finish and finish[0] <= self.now:
                finish.popleft()
        at = min(range(len(self._finish)), key=lambda i: len(self._finish[i]))
        return at if len(self._finish[at]) < IN_FLIGHT else None

    def _send(self, at: int, batch: Any) -> float:
        """Queue a batch; return when its answer is there."""
        self.now, self.busy_s = self.now + self.call_s, self.busy_s + self.call_s
        begin = max(self.now, self._finish[at][-1] if self._finish[at] else 0.0)
        self._finish[at].append(begin + self.seconds[at])
        self.batches += 1
        self.nbytes += nbytes(batch) * (1 + (1 if isinstance(batch, TileBatch) else 16))  # and the answer
        return begin + float(self.seconds[at])

    def _wait(self, until: float) -> None:
        """Let time pass to the next answer of any replica, at most to `until`."""
        coming = [finish[0] for finish in self._finish if finish and finish[0] > self.now]
        self.now = min([until, *coming])


class Commits(SilentWatch):
    """Notes the virtual time at which each step was committed; the first is the pass's beginning."""

    def __init__(self, replicas: SimulatedReplicas) -> None:
        self._replicas = replicas
        self.at: list[float] = []

    def step(self, name: str, done: int, total: int) -> None:
        self.at.append(self._replicas.time())


def _step(message: Any) -> str:
    """Return "pass/step/level" of a batch or answer."""
    return message.key.rpartition("/")[0]


def measure(
    size: int, seconds: np.ndarray, call_s: float, steps: int, barriers: bool = False, clock: str = "wall"
) -> dict[str, object]:
    """Sample the first steps, three or more, of a canvas; return what was found."""
    settings = {"sampling.batch_size": 16, "decode.batch_size": 8, "guidance.method": "linear"}
    run = BareRun.of(demo_config(size, settings), BRCA_SCALE, SSL_DIM, MAPS).first_steps(steps)
    replicas = SimulatedReplicas(seconds, call_s, barriers, CLOCKS[clock])
    with tempfile.TemporaryDirectory() as folder:
        commits = Commits(replicas)
        sampling = replace(run.open(Path(folder) / "run", replicas), watch=commits)
        with sampling.canvas:
            replicas.start()
            sample_large(sampling)
            replicas.coordinated()
    rate = float((1 / seconds).sum() * seconds.min())  # in replicas of the fastest kind
    count = replicas.batches / steps  # the guide's decoding among them
    steady = (commits.at[-2] - commits.at[1]) / (steps - 2)
    return {
        "size_px": size,
        "replicas": len(seconds),
        "slowest": float(seconds.max() / seconds.min()),
        "barriers": barriers,
        "levels": [n.name for n in run.plan.levels],
        "clock": clock,
        "batches_per_step": count,
        "seconds_per_step": replicas.now / steps,
        "efficiency": replicas.batches * float(seconds.min()) / (rate * replicas.now),
        "steady_efficiency": count * float(seconds.min()) / (rate * steady),
        "coordinator_busy": replicas.busy_s / replicas.now,
        "coordinator_s_per_step": replicas.busy_s / steps,
        "saturates_at_replicas": replicas.batches * float(seconds.min()) / replicas.busy_s,
        "megabytes_per_step": replicas.nbytes / steps / 1e6,
        "canvas_megabytes_per_step": 3 * latents_nbytes(run.plan) / 1e6,
    }


def latents_nbytes(plan: Plan) -> int:
    """Return the bytes of one buffer of all levels; a step reads it twice (tiles, update) and writes it once."""
    return sum(LATENT_CHANNELS * level.height * level.width * 4 for level in plan.levels)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="4096,16384", help="px of the square canvases")
    parser.add_argument("--replicas", default="1,8,64,256")
    parser.add_argument("--batch_s", type=float, default=0.2, help="seconds a replica takes for 16 tiles")
    parser.add_argument("--call_s", type=float, default=0.002, help="driver seconds a batch costs in Ray")
    parser.add_argument("--steps", type=int, default=4, help="steps to sample")
    parser.add_argument("--slow", type=float, default=1.0, help="the first replica is that many times slower")
    parser.add_argument("--barriers", action="store_true", help="wait for every answer at the end of each step")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="what times the coordinator's work")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in map(int, a.sizes.split(",")):
        for count in map(int, a.replicas.split(",")):
            seconds = np.full(count, a.batch_s)
            seconds[0] *= a.slow
            rows.append(measure(size, seconds, a.call_s, a.steps, a.barriers, a.clock))
            print(json.dumps(rows[-1]), flush=True)
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
