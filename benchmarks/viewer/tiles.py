"""How many tiles per second of processor time does the viewer serve, and in how much memory?

    python -m benchmarks.viewer.tiles [--side 65536] [--tiles 400] [--json FILE]

The picture is an OME-Zarr of `side`² px with all its levels. Every chunk is a link to one, 512² px of a phantom slide,
so that it takes no room on the disk; each is read, decoded and encoded as any other. One client, a process of its own,
asks for tiles at random places, two fifths of them px of the picture itself. Time and memory are the server's.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import zarr

from benchmarks.support.arguments import figures_parser, write_json
from engine.images.ome_zarr import CHUNK_PX, Image, ngff_metadata
from engine.slides.phantom.render import Phantom
from engine.viewer.config import ViewConfig
from engine.viewer.server import running

MPP_UM = 0.5
_CLIENT = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
for path in sys.stdin.read().split():
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200 and body, (path, answer.status)
"""


def linked_picture(path: Path, side: int) -> None:
    """Make a picture of `side`² px, a multiple of 512 by a power of two, whose chunks are links to one."""
    pixels = Phantom(0).render(0, 0, CHUNK_PX, CHUNK_PX, MPP_UM)
    one = Image.of_rows(
        path.with_name("one.zarr"), [pixels.transpose(2, 0, 1)], (CHUNK_PX, CHUNK_PX), MPP_UM, "one", {}
    )
    chunk = one.path / "0" / "c" / "0" / "0" / "0"
    Image.create(path, side, side, MPP_UM, "linked", {})
    level = 0
    while side >= CHUNK_PX:
        if level:
            other = Image.create(path.with_name(f"{level}.zarr"), side, side, MPP_UM, "level", {}).path
            shutil.move(other / "0", path / str(level))
        for y in range(side // CHUNK_PX):
            row = path / str(level) / "c" / "0" / str(y)
            row.mkdir(parents=True)
            for x in range(side // CHUNK_PX):
                os.link(chunk, row / str(x))
        side, level = side // 2, level + 1
    zarr.open_group(path, mode="r+").attrs["ome"] = ngff_metadata("linked", MPP_UM, level)


def addresses(item: str, side: int, count: int) -> list[str]:
    """Return `count` tiles at random, of the deepest level and three above it, none above 512 px."""
    draw, deepest = random.Random(1), (side - 1).bit_length()
    found = []
    for _ in range(count):
        depth = max(deepest - draw.choice([0, 0, 1, 2, 4]), (CHUNK_PX - 1).bit_length())
        across = 2**depth // CHUNK_PX
        found.append(f"/dzi/{item}/picture/{depth}/{draw.randrange(across)}_{draw.randrange(across)}.jpg")
    return found


def measure(side: int, tiles: int) -> dict[str, float]:
    """Return tiles per second of the server's processor time and of the wall, and what its memory grows by."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "linked.ome.zarr"
        linked_picture(path, side)
        with running(ViewConfig(str(path), port=0)) as server:
            asked = addresses(server.app.library.items[0].id, side, tiles)
            process = psutil.Process()
            memory, cpu, wall = process.memory_info().rss, time.process_time(), time.perf_counter()
            command = [sys.executable, "-c", _CLIENT, str(server.port)]
            subprocess.run(command, input="\n".join(asked), text=True, check=True)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            grown = process.memory_info().rss - memory
    return {"side_px": side, "tiles": tiles, "tiles_per_cpu_s": tiles / cpu, "tiles_per_s": tiles / wall,
            "memory_grown_mb": grown / 1e6}  # fmt: skip


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--side", type=int, default=65536, help="px, 512 times a power of two")
    parser.add_argument("--tiles", type=int, default=400)
    args = parser.parse_args()
    figures = measure(args.side, args.tiles)
    print(json.dumps(figures, indent=1))
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
