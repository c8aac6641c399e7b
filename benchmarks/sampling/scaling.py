"""How many replicas can one coordinator feed? The real coordinator and canvas, simulated replicas, a clock that skips.

    python -m benchmarks.sampling.scaling [--sizes 4096,16384] [--replicas 1,8,64,256] [--batch_s 0.2] [--slow 1] \
        [--json FILE]

The coordinator's work (cutting, averaging, guidance, update, zarr, commit) is done for real, with its threads; a
replica's is not: a batch takes it `batch_s` of virtual time, and its answer is that of the pointwise denoiser. The
virtual clock is this machine's own, which goes on whatever the process does, the simulation itself included; only
where the loop waits for replicas AND no thread of the coordinator has work left does it skip, to the next answer. So
work beside the loop takes the cores and the seconds that it really takes, and is hidden only by waiting that there
would really be. For Ray's own work in the driver the loop is kept busy for `call_s` a batch, which is measured by
benchmarks.sampling.calls; making up the answer is part of it.

efficiency = compute time of all batches / (replicas × time that passed), where a slow replica counts by its speed;
steady_efficiency = the same between the first commit and the last but one, without the start and the end of the run;
busy = the share of time in which the loop did not wait for replicas; saturates = the replicas that the loop can feed at
all, the compute time of a step over its busy time (too many where few replicas never make it wait for its threads).
On a machine that is busy with something else two other clocks say something, both without waiting for the disk: `loop`
counts the loop's processor time, as if its threads had cores of their own and never made it wait, and `cpu` that of the
whole process, as if one core did everything. What the threads take is given apart (threads_cpu); two of them share it.
"""

import heapq
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.batches import nbytes
from benchmarks.sampling.memory import MAPS
from benchmarks.support.arguments import figures_parser
from benchmarks.support.bare import BareRun, demo_config
from benchmarks.support.virtual import IN_FLIGHT, Run, VirtualReplicas
from engine.core.streaming import Workers
from engine.core.units import BRCA_SCALE, LATENT_CHANNELS
from engine.parity_checks.activations import SilentCallback
from engine.sampling.plan import Plan
from engine.sampling.sampler import sample_large

SSL_DIM = 1024
"""Of the published BRCA checkpoint's encoder (UNI)."""
CALL_S = 0.0014
"""The driver's main thread, as benchmarks.sampling.calls found; Ray's own threads take 0.9 ms more, beside it."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "loop": time.thread_time}


class SimulatedReplicas(VirtualReplicas):
    """DenoiseTiles with the pool's queueing and a clock that skips."""

    def __init__(
        self,
        seconds: np.ndarray,
        call_s: float,
        barriers: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        idle: Callable[[], bool] = lambda: True,
    ) -> None:
        """`seconds` (R,): of a batch on each replica; `idle` says whether the coordinator's threads have no work.

        `barriers` holds the batches of a level's step back until the one before is wholly answered, for comparison.
        """
        super().__init__(clock)
        self.seconds, self.call_s, self.barriers, self.idle = seconds, call_s, barriers, idle
        self.waited_s, self.nbytes = 0.0, 0
        self._free_at = np.zeros(len(seconds))
        self._by_load = [dict.fromkeys(range(len(seconds))), *({} for _ in range(IN_FLIGHT))]
        """Replicas with 0, 1, … batches; a dict, because it keeps order and forgets quickly."""

    @property
    def busy_s(self) -> float:
        return self.now - self.waited_s

    def _answers(self, run: Run) -> Iterator[Any]:
        """Yield None once, then answers in order, as the pool does: read ahead while a replica has room."""
        self._runs.append(run)
        try:
            yield None
            while run.more or run.pending:
                for other in reversed(self._runs):
                    self._dispatch(other)
                if run.pending and run.pending[0][0] <= self.tick():
                    yield run.pending.popleft()[1]
                elif self._coming:
                    self._wait()
                elif run.more and run.held is None:
                    raise RuntimeError("a source of batches must have one when every answer was taken; got None.")
        finally:
            self._runs.remove(run)

    def _dispatch(self, run: Run) -> None:
        """Queue a run's batches while a replica has room."""
        while run.more and not run.asking and len(run.pending) < 2 * IN_FLIGHT * len(self.seconds):
            if self._room() is None:
                return
            if run.held is None:
                run.asking = True
                found = list(islice(run.source, 1))
                run.asking, run.more = False, bool(found)
                run.held = found[0] if found else None
            at = self._room()  # looked up again: the source may have used the replicas meanwhile
            waits = self.barriers and run.pending and run.held and _step(run.pending[-1][1]) != _step(run.held)
            if run.held is None or at is None or waits:
                return
            self._send(at, run)

    def _room(self) -> int | None:
        """Return the least busy replica with room."""
        self._settle()
        return next((at for load in self._by_load[:-1] for at in load), None)

    def _settle(self) -> None:
        """Note the answers that are there by now."""
        self.tick()
        while self._coming and self._coming[0][0] <= self.now:
            self._load(heapq.heappop(self._coming)[1], -1)

    def _load(self, at: int, change: int) -> None:
        load = next(i for i, replicas in enumerate(self._by_load) if at in replicas)
        del self._by_load[load][at]
        self._by_load[load + change][at] = None

    def _send(self, at: int, run: Run) -> None:
        """Queue the batch that a run holds, and be as long about it as Ray is."""
        begin, batch, run.held = self.tick(), run.held, None
        answer = run.answer_to(batch)
        while self.tick() < begin + self.call_s:
            pass
        self._free_at[at] = finish = max(self.now, self._free_at[at]) + self.seconds[at]
        heapq.heappush(self._coming, (finish, at))
        self._load(at, 1)
        run.pending.append((finish, answer))
        self.batches += 1
        self.nbytes += nbytes(batch) + nbytes(answer)

    def _wait(self) -> None:
        """Let time pass to the next answer of any replica: for real while the coordinator's threads are at work."""
        begin = self.tick()
        while not self.idle() and self.tick() < self._coming[0][0]:
            time.sleep(1e-4)
        self.now = max(self.tick(), self._coming[0][0])
        self.waited_s += self.now - begin
        self._settle()


class Commits(SilentCallback):
    """Notes the virtual time at which each step was committed; the first is the pass's beginning."""

    def __init__(self, replicas: SimulatedReplicas) -> None:
        self._replicas = replicas
        self.at: list[float] = []

    def step(self, name: str, done: int, total: int) -> None:
        self.at.append(self._replicas.tick())


def _step(message: Any) -> str:
    """Return "pass/step/level" of a batch or answer."""
    return message.key.rpartition("/")[0]


def measure(
    size: int, seconds: np.ndarray, call_s: float, steps: int, barriers: bool = False, clock: str = "wall"
) -> dict[str, object]:
    """Sample the first steps, three or more, of a canvas; return what was found."""
    # Levels side by side: every step has the same work, so that a few of them stand for all.
    settings = {"sampling.from_guide": 0, "sampling.batch_size": 16, "decode.batch_size": 8}
    run = BareRun.of(demo_config(size, settings), BRCA_SCALE, SSL_DIM, MAPS).first_steps(steps)
    replicas = SimulatedReplicas(seconds, call_s, barriers, CLOCKS[clock])
    with tempfile.TemporaryDirectory() as folder:
        commits, workers = Commits(replicas), Workers()
        replicas.idle = lambda: workers.idle
        sampling = replace(run.open(Path(folder) / "run", replicas), watch=commits, workers=workers)
        with sampling.canvas:
            replicas.start()
            loop, process = time.thread_time(), time.process_time()
            sample_large(sampling)
            loop, process = time.thread_time() - loop, time.process_time() - process
            replicas.tick()
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
        "loop_cpu_s_per_step": loop / steps,
        "threads_cpu_s_per_step": (process - loop) / steps,
        "saturates_at_replicas": replicas.batches * float(seconds.min()) / replicas.busy_s,
        "megabytes_per_step": replicas.nbytes / steps / 1e6,
        "canvas_megabytes_per_step": 3 * latents_nbytes(run.plan) / 1e6,
    }


def latents_nbytes(plan: Plan) -> int:
    """Return the bytes of one buffer of all levels; a step reads it twice (tiles, update) and writes it once."""
    return sum(LATENT_CHANNELS * level.height * level.width * 4 for level in plan.levels)


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--sizes", default="4096,16384", help="px of the square canvases")
    parser.add_argument("--replicas", default="1,8,64,256")
    parser.add_argument("--batch_s", type=float, default=0.2, help="seconds a replica takes for 16 tiles")
    parser.add_argument("--call_s", type=float, default=CALL_S, help="seconds of the loop that a batch costs in Ray")
    parser.add_argument("--steps", type=int, default=4, help="steps to sample")
    parser.add_argument("--slow", type=float, default=1.0, help="the first replica is that many times slower")
    parser.add_argument("--barriers", action="store_true", help="wait for every answer at the end of each step")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="what times the coordinator's work")
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
