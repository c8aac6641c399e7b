"""Is a picture of low magnification enlarged better than bicubically? Held-out phantoms, 4× or another scale.

    python -m benchmarks.quality.superres [--regions 2] [--size 1024] [--write docs/results/super_resolution.md]
    python -m benchmarks.quality.superres --scale 8 --defaults

Each region at 20x is box-averaged (4×: to 5x) and enlarged by `python -m engine.superres`'s own path, without Ray; its
SSL grid is recovered once. PSNR and SSIM (Wang et al. 2004, Gaussian window) against the region, and PSNR of the
result, averaged down, against its input. Bicubic is Pillow's; "bicubic, moved" is bicubic made consistent with the
input as the results are, without a model.
Figures are of pictures, not of time, so a busy machine does not matter.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from skimage.metrics import structural_similarity

from benchmarks.quality.quality import psnr
from benchmarks.support.arguments import figures_parser, write_json
from engine.conditions.conditions import STORED
from engine.core.cli import parse
from engine.core.progress import Progress
from engine.core.runtime import pin_arithmetic
from engine.generation.run import run
from engine.generation.session import local_backend
from engine.generation.superres import SuperresConfig, plan_run
from engine.images.ome_zarr import Image
from engine.sampling.back_projection import moved_onto
from engine.sampling.pixels import to_uint8
from engine.slides.phantom.render import Phantom
from engine.training.demo.data import HELDOUT_SEED, box_average

FIRST_SEED = HELDOUT_SEED + 100
"""Far from where the trainer's held-out regions lie."""
COLUMNS = ("method", "PSNR, dB", "SSIM", "against its input, dB")
START, END = "<!-- measured -->\n", "<!-- /measured -->\n"


@dataclass(frozen=True)
class Setting:
    """One way to enlarge: flags over the command's defaults, and how many seeds are averaged."""

    name: str
    flags: tuple[str, ...] = ()
    seeds: int = 1


SETTINGS = (
    Setting("the command's defaults (t = 200, w = 1)"),
    Setting("t = 300", ("--sampling.start=300",)),
    Setting("mean of 4 seeds, t = 300", ("--sampling.start=300",), seeds=4),
    Setting("from noise, guided from t = 1000 to 300", ("--sampling.start=1000", "--guidance.to_t=300")),
)


def enlarge(low: np.ndarray, factor: int, setting: Setting, folder: Path) -> np.ndarray:
    """Return a picture (h, w, 3) enlarged on both sides, the mean over the setting's seeds: uint8.

    The grid that the first run in `folder` recovers is kept there for later ones.
    """
    source, grid = folder / "low.png", folder / "grid.npy"
    PIL.Image.fromarray(low).save(source)
    found = []
    for seed in range(setting.seeds):
        flags = [f"--image={source}", f"--scale={factor}", f"--sampling.seed={seed}", "--output.formats=[]"]
        out = Path(tempfile.mkdtemp(dir=folder)) / "run"
        flags += [f"--output.folder={out}", *setting.flags]
        flags += [f"--embeddings={grid}"] if grid.exists() else []
        run(plan_run(parse(flags, SuperresConfig, "benchmarks.quality.superres", "")), local_backend, Progress())
        if not grid.exists():
            shutil.copyfile(out / STORED, grid)
        image = Image.open(out / "image.ome.zarr")
        found.append(image.read(0, image.height).transpose(1, 2, 0))
    return np.rint(np.mean(found, axis=0)).astype(np.uint8)


def bicubic(low: np.ndarray, factor: int) -> np.ndarray:
    size = (low.shape[1] * factor, low.shape[0] * factor)
    return np.asarray(PIL.Image.fromarray(low).resize(size, PIL.Image.Resampling.BICUBIC))


def moved(picture: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return a picture made consistent with its input, as results are."""
    large, small = (torch.from_numpy((p.transpose(2, 0, 1)[None] + 0.5) / 127.5 - 1).float() for p in (picture, low))
    return to_uint8(moved_onto(large, small, picture.shape[0] // low.shape[0])[0].numpy()).transpose(1, 2, 0)


def figures(picture: np.ndarray, truth: np.ndarray, low: np.ndarray) -> tuple[float, float, float]:
    """Return PSNR and SSIM against the truth, and PSNR of the picture, averaged down, against its input."""
    likeness: Any = structural_similarity(
        picture, truth, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    h, w, c = low.shape
    small = picture.reshape(h, picture.shape[0] // h, w, picture.shape[1] // w, c).mean(axis=(1, 3))
    return psnr(picture, truth), float(likeness), psnr(small, low)


def measure(
    truth: np.ndarray, factor: int, settings: Sequence[Setting], sheet: Path | None
) -> dict[str, tuple[float, float, float]]:
    """Return the figures of every way to enlarge one region; `sheet` shows their middles beside the truth."""
    low = box_average(truth, factor)
    plain = bicubic(low, factor)
    pictures = {"bicubic": plain, "bicubic, moved onto its input": moved(plain, low)}
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            pictures[setting.name] = enlarge(low, factor, setting, Path(folder))
    if sheet is not None:
        middle = truth.shape[0] // 2 - 128
        cut = [p[middle : middle + 256, middle : middle + 256] for p in (*pictures.values(), truth)]
        PIL.Image.fromarray(np.concatenate(cut, axis=1)).save(sheet)
    return {name: figures(picture, truth, low) for name, picture in pictures.items()}


def table(found: list[dict[str, tuple[float, float, float]]]) -> str:
    """Return the means over regions as a table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|"]
    for name in found[0]:
        means = np.mean([region[name] for region in found], axis=0)
        lines.append(f"| {name} | {means[0]:.2f} | {means[1]:.3f} | {means[2]:.1f} |")
    return "\n".join(lines) + "\n"


def put_into(page: Path, text: str) -> None:
    """Replace what lies between the page's marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{START}{text}{END}{after}", encoding="utf-8")


def main(argv: Iterable[str] | None = None) -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--regions", type=int, default=2, help="held-out phantom slides")
    parser.add_argument("--size", type=int, default=1024, help="px of each region at 20x")
    parser.add_argument("--scale", type=int, default=4, choices=(2, 4, 8, 16), help="on each side")
    parser.add_argument("--defaults", action="store_true", help="the command's defaults alone")
    parser.add_argument("--sheet", type=Path, help="PNG of the first region's middle: each row of the table, the truth")
    parser.add_argument("--write", type=Path, help="page with marks to put the table into")
    arguments = parser.parse_args(None if argv is None else list(argv))
    pin_arithmetic(1)
    found, settings = [], SETTINGS[:1] if arguments.defaults else SETTINGS
    for number in range(arguments.regions):
        truth = Phantom.varied(FIRST_SEED + number).render(0, 0, arguments.size, arguments.size, 0.5)
        found.append(measure(truth, arguments.scale, settings, None if number else arguments.sheet))
        print(json.dumps(found[-1]), flush=True)
    text = table(found)
    print(text)
    write_json(arguments.json, found)
    if arguments.write:
        put_into(arguments.write, f"{arguments.regions} held-out phantom(s) of {arguments.size}² px at 20x.\n\n{text}")


if __name__ == "__main__":
    main()
