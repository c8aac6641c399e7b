"""Does a cohort keep many replicas busy? Real coordinators on simulated replicas, with a clock that skips.

    python -m benchmarks.sampling.cohort [--size 4096] [--replicas 64,256] [--share 8] [--at_once 1,3] \
        [--pictures 12] [--json FILE]

A cohort on R replicas is led by R / share coordinators, processes that know nothing of each other: each has a share of
the replicas of its own and takes the next picture when one is done. So one coordinator is run, and its time is that of
all: they are taken to have a core each. What it does is real: it leads `at_once` pictures side by side, from their
conditions to file, preview and report, in threads, with canvases and files on this machine's disk. What a replica does
is not: a batch takes it virtual time in proportion to its FLOP (batch_s: 16 tiles and w > 0), and its answer is that of
the pointwise denoiser. The clock is the process' own processor time, all threads together, as if the coordinator had
one core; waiting for the disk does not count. Where every picture waits for replicas it skips to the next answer. For
Ray's work in the driver a batch costs `call_s` more, which benchmarks.sampling.calls has measured. Not in it: the
command's own work, one call of an actor per picture, and the start of Ray and of the replicas.

efficiency = seconds of computing of all batches / (replicas × time from the first picture's begin to the last one's
end); steady = the same between the end of the first `at_once` pictures and the beginning of the last ones' end, as a
long cohort has it; busy = seconds of the coordinator's core / time. `--at_once 1` makes pictures one after another.
"""

import itertools
import tempfile
import threading
from pathlib import Path

import torch

from actors.cohort import REPLICAS_PER_COORDINATOR
from benchmarks.sampling.memory import MAPS
from benchmarks.sampling.scaling import CALL_S, SSL_DIM
from benchmarks.support.arguments import figures_parser, write_json
from benchmarks.support.bare import BareRun, demo_config
from benchmarks.support.shared_replicas import TILES, SharedReplicas
from engine.core.progress import Clock
from engine.core.units import BRCA_SCALE
from engine.generation import outputs
from engine.images.ome_zarr import Image
from engine.images.tiff import write_ome_tiff


class Job:
    """A coordinator's pictures: taken one after another by `at_once` threads, from a common row."""

    def __init__(self, size: int, replicas: SharedReplicas, folder: Path, pictures: int) -> None:
        settings = {"sampling.batch_size": TILES, "decode.batch_size": 8, "output.formats": "[]"}
        self.run = BareRun.of(demo_config(size, settings), BRCA_SCALE, SSL_DIM, MAPS)
        self.replicas, self.folder = replicas, folder
        self.begun_at: list[float] = []
        self.done_at: list[float] = []
        self.computed_at: list[float] = []
        """Seconds of computing until each picture was done."""
        self._next = iter(range(pictures))
        self._taking = threading.Lock()

    def lead(self) -> None:
        """Make pictures while there are any."""
        while True:
            with self._taking:
                number = next(self._next, None)
            if number is None:
                return
            self.replicas.joined(1)
            try:
                self.begun_at.append(self.replicas.now)
                self._make(self.folder / str(number))
                self.done_at.append(self.replicas.tick())
                self.computed_at.append(self.replicas.computed_s)
            finally:
                self.replicas.joined(-1)

    def _make(self, folder: Path) -> None:
        """Sample, decode, judge and export as a cohort does."""
        run, clock = self.run, Clock()
        run.go(folder, self.replicas)
        outputs.export(folder, run.config, run.plan, clock)
        outputs.report(folder, run.config, run.plan, {}, clock)
        write_ome_tiff(folder / "picture.ome.tiff", Image.open(folder / outputs.IMAGE))


def measure(
    size: int, share: int, at_once: int, pictures: int, batch_s: float = 0.2, call_s: float = CALL_S
) -> dict[str, object]:
    """Let one coordinator make its pictures; return what was found."""
    replicas = SharedReplicas(share, batch_s, call_s)
    with tempfile.TemporaryDirectory() as parent:
        job = Job(size, replicas, Path(parent), pictures)
        replicas.tick()
        start = replicas.now
        threads = [threading.Thread(target=job.lead) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wall = job.done_at[-1] - start
    first, last = at_once - 1, len(job.done_at) - at_once
    steady = None
    if last > first:
        passed = job.done_at[last] - job.done_at[first]
        steady = (job.computed_at[last] - job.computed_at[first]) / (share * passed)
    return {
        "size_px": size,
        "replicas_of_a_coordinator": share,
        "pictures_at_once": at_once,
        "pictures": pictures,
        "efficiency": replicas.computed_s / (share * wall),
        "steady_efficiency": steady,
        "coordinator_busy": 1 - replicas.skipped_s / wall,
        "coordinator_s_per_picture": (wall - replicas.skipped_s) / pictures,
        "replica_s_per_picture": replicas.computed_s / pictures,
        "seconds_per_picture": wall / pictures,
        "batches_per_picture": replicas.batches / pictures,
    }


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--size", type=int, default=4096, help="px of the square pictures")
    parser.add_argument("--replicas", default="64,256", help="of the whole cohort")
    parser.add_argument("--share", default=str(REPLICAS_PER_COORDINATOR), help="replicas of one coordinator")
    parser.add_argument("--at_once", default="1,3", help="pictures a coordinator leads side by side")
    parser.add_argument("--pictures", type=int, default=12, help="of one coordinator")
    parser.add_argument("--batch_s", type=float, default=0.2, help="seconds a replica takes for 16 tiles")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    numbers = ([int(n) for n in text.split(",")] for text in (a.share, a.at_once))
    for share, at_once in itertools.product(*numbers):
        found = measure(a.size, share, at_once, a.pictures, a.batch_s)
        cohorts = {n: {"coordinators": n // share, "pictures": n // share * a.pictures}
                   for n in map(int, a.replicas.split(","))}  # fmt: skip
        rows.append(found | {"cohorts": cohorts})
        print(rows[-1], flush=True)
    write_json(a.json, rows)


if __name__ == "__main__":
    main()
