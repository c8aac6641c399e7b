"""What a run leaves for people: the decoded picture, the guide's picture, exports, preview and report.

Each file is whole or not there; what is there is not made again. It does not know how latents came about.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL.Image

from engine.canvas.canvas import BAND
from engine.core.progress import Clock
from engine.core.streaming import BandReader, Box, cut
from engine.core.units import LATENT_FACTOR, TILE_LATENT_PX
from engine.images.detail import detail_of
from engine.images.formats import write_export
from engine.images.metrics import consistency_psnr, seam_score, seam_scores, write_report
from engine.images.ome_zarr import TOP_PX, Image
from engine.images.png import write_picture, write_preview
from engine.sampling.back_projection import consistent_rows, rows_above
from engine.sampling.config import ExportFormat, RunConfig
from engine.sampling.pixels import decode_rows, to_uint8
from engine.sampling.plan import Level, Plan
from engine.sampling.sampler import Sampling, picture_of

IMAGE, PREVIEW, GUIDE, REPORT = "image.ome.zarr", "preview.png", "guide.png", "report.json"
EXPORTS: dict[ExportFormat, str] = {
    "tiff": "image.tiff",
    "ome-tiff": "image.ome.tiff",
    "dzi": "image.dzi",
    "png": "image.png",
}
"""Format → its name in the run folder."""


def wanted(config: RunConfig, plan: Plan) -> list[str]:
    """Return the names in the run folder that a finished run has."""
    names = [IMAGE, *([GUIDE] if guide_level(plan) else [])]
    names += [EXPORTS[f] for f in config.output.formats]
    return [*names, PREVIEW, REPORT]


def missing(folder: Path, config: RunConfig, plan: Plan) -> list[str]:
    """Return which of them are not there."""
    return [name for name in wanted(config, plan) if not (folder / name).exists()]


def needs_network(names: list[str]) -> bool:
    """Say whether making these takes the decoder."""
    return IMAGE in names or GUIDE in names


def guide_level(plan: Plan) -> Level | None:
    """Return the level that steers the finest one."""
    return plan.levels[-2] if len(plan.levels) > 1 else None


def decode(s: Sampling, folder: Path, mpp_um: float, provenance: dict[str, object]) -> None:
    """Decode the finest level into image.ome.zarr from where that was interrupted, and the guide into guide.png."""
    path, size = folder / IMAGE, (s.plan.finest.height, s.plan.finest.width)
    height, width = s.plan.size_px
    start = s.canvas.progress.decoded_px if path.exists() else 0
    image = Image.open(path) if start else Image.create(path, height, width, mpp_um, folder.name, provenance)
    if start < height:
        for done in image.fill(map(to_uint8, _decoded(s, size, start)), start):
            s.canvas.record(decoded_px=done)
    if max(image.sizes[-1]) > TOP_PX:  # the pyramid names its levels last, so it is whole or has to be made
        image.build_pyramid()
    level = guide_level(s.plan)
    if level is not None and not (folder / GUIDE).exists():
        write_picture(folder / GUIDE, to_uint8(_guide(s, level)), image.provenance)


def _decoded(s: Sampling, size: tuple[int, int], start: int) -> Iterator[np.ndarray]:
    """Yield the picture from row `start` on, float32 (3, n, w); where a guide is given, moved onto it."""
    height, width = s.plan.size_px
    factor = s.plan.levels[0].factor
    most = (s.guidance.back_projection or 0) if s.plan.given else 0
    first = max(start - rows_above(factor), 0) if most else start
    read = BandReader(lambda y0, y1: s.canvas.read(s.plan.finest.name, y0, y1), size[0], BAND)
    found = decode_rows(read, size, s.plan.decode, s.denoiser, s.decode_sigma, "decode", first // LATENT_FACTOR)
    rows = cut(found, (0, height - first), (0, width))
    if not most:
        return rows
    assert s.guide is not None  # a plan says so only when there is one
    return consistent_rows(rows, height, s.guide.image, factor, start, most)


def _guide(s: Sampling, level: Level) -> np.ndarray:
    """Return the picture of the level that steers the finest, float32 (3, h, w) in [−1, 1]."""
    if level in s.plan.sampled:
        return picture_of(s, level, s.canvas.read(level.name, 0, level.height), level.name)
    assert s.guide is not None  # what is not sampled is given
    return s.guide.image


def export(folder: Path, config: RunConfig, plan: Plan, clock: Clock) -> None:
    """Write what is asked for and not there."""
    image, todo, o = Image.open(folder / IMAGE), missing(folder, config, plan), config.output
    with clock.phase("exports"):
        for name in o.formats:
            if EXPORTS[name] in todo:
                compression = o.tiff_compression if name.endswith("tiff") else None
                write_export(folder / EXPORTS[name], image, name, compression, o.jpeg_quality)
        if PREVIEW in todo:
            write_preview(folder / PREVIEW, image, read_guide(folder, plan))


def read_guide(folder: Path, plan: Plan) -> np.ndarray | None:
    """Return the guide's picture where the canvas is, uint8 (3, h, w); None when a run has no guide."""
    level = guide_level(plan)
    if level is None:
        return None
    with PIL.Image.open(folder / GUIDE) as file:
        guide = np.asarray(file).transpose(2, 0, 1)
    height, width = (-(-side // level.factor) for side in plan.size_px)
    return guide[:, :height, :width]


class Part:
    """A box (px) of a picture, for the scores."""

    def __init__(self, image: Image, box: Box) -> None:
        self._image, self._box = image, box
        self.height, self.width = box.size

    @classmethod
    def multiple(cls, image: Image, factor: int) -> "Part":
        """Return the top-left part whose sides are multiples of a guide px."""
        return cls(image, Box(0, 0, *(side // factor * factor for side in (image.height, image.width))))

    def read(self, y0: int, y1: int) -> np.ndarray:
        """Return uint8 (3, y1-y0, width)."""
        return self._image.read(self._box.y0 + y0, self._box.y0 + y1, self._box.x0, self._box.x1)


def tile_edges(plan: Plan) -> tuple[list[int], list[int]]:
    """Return the rows and columns, in px, where a tile of the finest level or a decoded window begins or ends."""
    joint = plan.finest_pass.tilings[-1]
    assert joint is not None  # it is the pass that samples it

    def edges(starts: set[int], size_px: int) -> list[int]:
        return [min(e * LATENT_FACTOR, size_px) for p in starts for e in (p, p + TILE_LATENT_PX)]

    windows = plan.decode
    return edges({*joint.ys, *windows.ys}, plan.size_px[0]), edges({*joint.xs, *windows.xs}, plan.size_px[1])


def border_scores(image: Image, box: Box, rim: int) -> dict[str, object]:
    """Judge where a box (px) that was put into a picture ends, against what lies within `rim` px of that.

    `border` is the seam score of the line itself, `rim` that of the `rim` lines inside it: above 1 they are rougher
    than their neighbours, below 1 duller. Sides count by their length; None when all are the picture's own.
    """

    def score(axis: int, first: int, last: int, edges: Iterable[int]) -> float | None:
        """Score `edges` among the lines first..last along one side of the box."""
        first, last = max(first, 0), min(last, (image.height, image.width)[axis])
        strip = Box(first, box.x0, last, box.x1) if axis == 0 else Box(box.y0, first, box.y1, last)
        at = [edge - first for edge in edges]
        return seam_score(Part(image, strip), at if axis == 0 else [], at if axis else [])

    lines, bands, lengths = [], [], []
    sides = ((0, box.y0, box.y1, image.height, box.size[1]), (1, box.x0, box.x1, image.width, box.size[0]))
    for axis, start, stop, size, length in sides:
        for end, top in ((start, start), (stop, stop - rim)):
            if 0 < end < size:
                lines.append(score(axis, end - rim // 2, end + rim // 2, (end,)))
                bands.append(score(axis, top - rim, top + 2 * rim, range(top, top + rim)))
                lengths.append(length)
    if not lengths:
        return {"border_seam_score": None, "rim_seam_score": None}
    return {
        "border_seam_score": float(np.average(lines, weights=lengths)),
        "rim_seam_score": float(np.average(bands, weights=lengths)),
    }


def report(folder: Path, config: RunConfig, plan: Plan, facts: dict[str, object], clock: Clock) -> dict[str, object]:
    """Judge the picture and write report.json; return the scores."""
    image = Image.open(folder / IMAGE)
    guide, level = read_guide(folder, plan), guide_level(plan)
    with clock.phase("judging"):
        seam, control = seam_scores(image, *tile_edges(plan))
        scores: dict[str, object] = {"seam_score": seam, "seam_control": control, "consistency_psnr_db": None}
        if guide is not None and level is not None:
            part = Part.multiple(image, level.factor)
            inside = guide[:, : part.height // level.factor, : part.width // level.factor]
            scores["consistency_psnr_db"] = consistency_psnr(part, inside)
        scores["detail"] = asdict(detail_of(image))
    settings = {
        "size_px": [image.height, image.width],
        "levels": [n.name for n in plan.levels],
        "guidance": config.guidance.method,
        "dtype": config.model.dtype,
        "threads": config.model.threads,
        "channels_last": config.model.channels_last,
        "seed": config.sampling.seed,
    }
    write_report(folder / REPORT, {**scores, **settings, **facts}, clock.seconds)
    return scores
