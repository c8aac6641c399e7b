"""Does the driver's memory grow with the canvas? Peak of a whole run without a network, at two sizes.

    python -m benchmarks.sampling.memory [--sizes 2048,8192] [--formats tiff,png] [--stride 50] [--json FILE]

A run is sampling (20 steps unless --stride is given, linear guidance), decoding, exports, preview and report, with
PointwiseDenoiser in place of a model, so that what is left is what the driver holds. Each size has a process of its
own, and the peak is VmHWM of /proc/self/status: ru_maxrss is handed on to a new process by the one that starts it,
which would hide a growth. The difference is to be at most 300 MB. Linux only.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, this is not the project's folder

from benchmarks.support.arguments import figures_parser, write_json
from benchmarks.support.bare import BareRun, demo_config
from benchmarks.support.peak import peak_mb
from engine.core.progress import Clock
from engine.core.units import BRCA_SCALE
from engine.generation import outputs
from engine.sampling.denoiser import PointwiseDenoiser

ROOT = Path(__file__).resolve().parents[2]
SIZES = (2048, 8192)
FORMATS = ("tiff", "png")
TARGET_MB = 300
SSL_DIM = 8
MAPS = {"guidance/linear": {"matrix": torch.eye(3), "offset": torch.zeros(3)}}
"""The pointwise pictures are their latents; fitting the map would be a peak of its own, the same at every size."""


def weigh(size: int, formats: Sequence[str], stride: int = 50) -> dict[str, object]:
    """Do a whole run in this process; return the peak before it and after each part, in MB, and its seconds."""
    torch.set_num_threads(1)
    start, denoiser, peaks = time.perf_counter(), PointwiseDenoiser(), {}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        settings = {"output.folder": folder, "output.formats": f"[{','.join(formats)}]", "sampling.stride": stride}
        config = demo_config(size, settings)
        run = BareRun.of(config, BRCA_SCALE, SSL_DIM, MAPS)
        peaks["before"] = peak_mb()
        clock = Clock()
        timing = run.go(folder, denoiser, lambda part: peaks.update({part: peak_mb()}))
        outputs.export(folder, config, run.plan, clock)
        peaks["exports"] = peak_mb()
        outputs.report(folder, config, run.plan, {}, clock)
        peaks["report"] = peak_mb()
    seconds = {"sampling": timing.sampling_s, "decoding": timing.decoding_s, **clock.seconds}
    return {
        "size_px": size,
        "peak_mb": {k: round(v, 1) for k, v in peaks.items()},
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "wall_s": round(time.perf_counter() - start, 1),
    }


def weigh_apart(size: int, formats: Sequence[str], stride: int) -> dict[str, object]:
    """Do the same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.sampling.memory", "--one", str(size), "--formats", ",".join(formats)]
    command += ["--stride", str(stride)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def compare(sizes: Sequence[int], formats: Sequence[str], stride: int, say: Callable[[str], None]) -> dict[str, object]:
    """Weigh every size; return the figures and the difference between the last and the first."""
    rows = []
    for size in sizes:
        row = weigh_apart(size, formats, stride)
        rows.append(row)
        say(f"{size} px: peak {row['peak_mb']} MB, {row['seconds']} s")
    ends = [row["peak_mb"]["report"] for row in (rows[0], rows[-1])]  # type: ignore[index]
    difference = round(ends[1] - ends[0], 1)
    say(f"difference {difference} MB (target {TARGET_MB})")
    return {"formats": list(formats), "runs": rows, "difference_mb": difference, "target_mb": TARGET_MB}


def main(argv: list[str]) -> int:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="px, small to large")
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help="exports, such as tiff,ome-tiff,dzi,png, or nothing"
    )
    parser.add_argument("--one", type=int, help="weigh this size in this process and print JSON")
    parser.add_argument("--stride", type=int, default=50, help="timesteps between steps: 500 samples two steps alone")
    arguments = parser.parse_args(argv)
    formats = [name for name in arguments.formats.split(",") if name]
    if arguments.one:
        print(json.dumps(weigh(arguments.one, formats, arguments.stride)))
        return 0
    found = compare([int(size) for size in arguments.sizes.split(",")], formats, arguments.stride, print)
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
