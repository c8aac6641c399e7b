"""How fast are tiles read, and how many broken JPEG tiles are noticed? Our reader beside the plain libraries.

    python -m benchmarks.features.reading [--size 6000] [--tiles 400] [--rounds 5] [--json FILE]

One phantom slide, a JPEG pyramid. Rounds of 256 × 256 px tiles, the readers taking turns (A B C A B C ...), so that a
machine that gets slower meets them all; a figure is the median round in tiles per second of processor time, since other
load on the machine should not count. `aligned` tiles are tiles of the file, `unaligned` ones lie across four.

ours       engine.slides: open_slide(...).read(x, y, 256, 256, mpp): exact field, validity, damage noticed
openslide  read_region and drop alpha
tifffile   aszarr() and zarr, which takes any window; the way its documentation shows
segments   tifffile's page.decode of one whole tile of the file, found by hand: aligned tiles only, the least of work

The target is ours ≥ the faster of openslide and tifffile. Then one tile is broken in several ways, many times, and
decoded by us and by tifffile; counted is what was noticed.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
import zarr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, this is not the project's folder

from benchmarks.support.arguments import figures_parser, write_json
from engine.core.errors import UNREADABLE
from engine.slides.backends.tiff import TiffLevels
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.slide import write_phantom_slide
from engine.slides.slide import open_slide

MPP, TILE = 0.5, 256
BREAKS = ("cut", "zeros", "noise", "one bit")
ReadTile = Callable[[int, int], Any]


def readers(path: Path) -> dict[str, ReadTile]:
    """Return a way to read the tile with corner (x, y) for each library."""
    ours, theirs = open_slide(path), openslide.OpenSlide(path)
    tiff = tifffile.TiffFile(path)
    page: Any = tiff.pages[0]
    array: Any = zarr.open_array(tiff.series[0].aszarr(level=0), mode="r")
    file, columns = path.open("rb"), -(-page.imagewidth // TILE)

    def segment(x: int, y: int) -> np.ndarray:
        index = y // TILE * columns + x // TILE
        file.seek(page.dataoffsets[index])
        return page.decode(file.read(page.databytecounts[index]), index)[0][0]

    return {
        "ours": lambda x, y: ours.read(x, y, TILE, TILE, MPP).pixels,
        "openslide": lambda x, y: np.asarray(theirs.read_region((x, y), 0, (TILE, TILE)))[..., :3],
        "tifffile": lambda x, y: array[y : y + TILE, x : x + TILE],
        "segments": segment,
    }


def measure(path: Path, size: int, tiles: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return tiles/s of processor time by kind of tile and reader."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, size // TILE - 2, (tiles, 2)) * TILE
    found: dict[str, dict[str, float]] = {}
    for kind, shift in (("aligned", 0), ("unaligned", TILE // 2)):
        ways = {name: way for name, way in readers(path).items() if not (shift and name == "segments")}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.process_time()
                for x, y in corners.tolist():
                    way(x + shift, y + shift)
                seconds[name].append(time.process_time() - start)
        found[kind] = {name: tiles / statistics.median(spent) for name, spent in seconds.items()}
        found[kind]["ratio"] = found[kind]["ours"] / max(found[kind]["openslide"], found[kind]["tifffile"])
    return found


def broken(data: bytes, how: str, rng: np.random.Generator) -> bytes:
    """Return a JPEG stream with something wrong in its scan."""
    at, count = int(rng.integers(700, len(data) - 600)), int(rng.integers(16, 512))
    if how == "cut":
        return data[:at] + b"\xff\xd9"
    if how == "one bit":
        return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
    return data[:at] + (bytes(count) if how == "zeros" else rng.bytes(count)) + data[at + count :]


def count_noticed(path: Path, trials: int) -> dict[str, dict[str, float]]:
    """Return the share of broken tiles that each decoder refuses."""
    rng = np.random.default_rng(1)
    levels: Any = open_slide(path)._levels
    assert isinstance(levels, TiffLevels)
    segments = levels._segments[0]
    index = int(np.argmax(segments._counts))
    data = levels._read(int(segments._offsets[index]), int(segments._counts[index]))
    found = {}
    for how in BREAKS:
        streams = [broken(data, how, rng) for _ in range(trials)]
        found[how] = {
            "ours": sum(segments._strictly(s, index) is None for s in streams) / trials,
            "tifffile": sum(_refused(segments, s, index) for s in streams) / trials,
        }
    return found


def _refused(segments: Any, data: bytes, index: int) -> bool:
    try:
        return segments._as_tifffile(data, index) is None
    except UNREADABLE:
        return True


def main() -> None:
    """Write the slide, measure, print."""
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--size", type=int, default=6000, help="edge of the slide in px")
    parser.add_argument("--tiles", type=int, default=400, help="tiles per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tiff"
        write_phantom_slide(path, Phantom(2), arguments.size, arguments.size, MPP)
        speed = measure(path, arguments.size, arguments.tiles, arguments.rounds)
        noticed = count_noticed(path, 200)
    for kind, figures in speed.items():
        print(f"{kind}: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    for how, shares in noticed.items():
        print(f"{how}: noticed by us {shares['ours']:.0%}, by tifffile {shares['tifffile']:.0%}")
    write_json(arguments.json, {"tiles_per_s": speed, "noticed": noticed})


if __name__ == "__main__":
    main()
