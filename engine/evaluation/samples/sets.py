"""What A and B are: runs, pictures and slides, or folders of them; and the 256² crops they give at one µm/px.

Invariant: crops are a pure function of the files, the rule and the seed; what cannot be read is listed and never left
out in silence. It does not know encoders or figures. Source of the crop rule: crops at random places rather than on
the grid of tiles, as in Graikos et al. 2024 (crop FID): a grid would lie between the seams and never show one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import tifffile
from numpy.typing import NDArray

from engine.core.errors import UNREADABLE, EngineError, SlideError
from engine.core.units import TILE_PX
from engine.evaluation.samples.crops import MOST_CROPS, Crop, CropRule, tissue_share
from engine.generation.finished_run import FinishedRun
from engine.generation.outputs import IMAGE
from engine.slides.boundary import one_slide
from engine.slides.folders import look_through
from engine.slides.slide import SLIDE_SUFFIXES, OpenSlides, Slide, open_slide, slide_name
from engine.slides.tile_grid import check_fine_enough

CONTACT_SHEET = "contact_sheet.png"
"""What the command that draws patches puts beside them; patches on white are no picture of the set."""
SAME_MPP = 0.01
"""µm/px that differ by less, relatively, are the same."""
MAX_DAMAGED = 0.02
"""Share of damaged px a crop may have, as for tiles of slides."""
_CHUNK = 256
"""Places looked at together, sorted by picture, so that each picture is opened seldom."""
_LUMINANCE_SUM = 3688
"""Sum of the luminance table of JPEG's Annex K, which is quality 50."""


class Unusable(NamedTuple):
    """An input that could not be used."""

    path: str
    code: str
    message: str


@dataclass(frozen=True)
class Source:
    """One picture of a set."""

    name: str
    path: Path
    mpp: float
    """µm per px as stored."""
    size: tuple[int, int]
    """(h, w) in px as stored."""
    codec: str
    """What the pixels went through, as far as the file tells."""
    run: Path | None = None
    """The folder of the run that made it."""


class PictureSet:
    """Pictures that can be read, and those that could not."""

    def __init__(self, where: str, sources: Sequence[Source], unusable: Sequence[Unusable], mpp: float | None) -> None:
        self.where, self.sources, self.unusable, self.mpp = where, list(sources), list(unusable), mpp
        shared = OpenSlides(mpp=mpp, limit=4)
        # The picture of a run says its µm/px even where no scanner could have it (aerial pictures).
        self._slides = {s.path: OpenSlides(mpp=s.mpp, limit=1) if s.run else shared for s in self.sources}

    @property
    def runs(self) -> list[Path]:
        """Folders of the runs among the pictures."""
        return [s.run for s in self.sources if s.run is not None]

    @property
    def codecs(self) -> dict[str, int]:
        """How many pictures went through which codec."""
        found: dict[str, int] = {}
        for source in self.sources:
            found[source.codec] = found.get(source.codec, 0) + 1
        return found

    def drop_coarser(self, mpp: float) -> None:
        """Take out and list the pictures that would have to be enlarged. Raises EngineError if none is left."""
        for source in self.sources[:]:
            try:
                check_fine_enough(self._slides[source.path].get(source.path), mpp)
            except SlideError as error:
                self.sources.remove(source)
                self.unusable.append(Unusable(str(source.path), error.code, str(error)))
        if not self.sources:
            raise EngineError(
                f"{self.where} must be fine enough for crops of {mpp:g} µm/px; none of its pictures is. The first: "
                f"{self.unusable[-1].message}"
            )

    def crops(self, rule: CropRule) -> Iterator[Crop]:
        """Yield the crops of a rule in an order drawn by its seed.

        Raises at the end: EngineError if there was no tissue, or fewer crops than asked for.
        """
        found = looked_at = 0
        for crop in self._candidates(rule):
            looked_at += 1
            if crop is not None:
                found += 1
                yield crop
            if found == (MOST_CROPS if rule.count is None else rule.count):
                return
        if not found:
            raise EngineError(
                f"{self.where} must show tissue: a crop counts from {rule.min_tissue:.0%} of px with mean grey below "
                f"{rule.tissue_grey:g}; none of {looked_at} does. Lower --min_tissue or raise --tissue_grey (256 "
                "counts every px)."
            )
        if rule.count is not None:
            raise EngineError(
                f"{self.where} must give the {rule.count} crops asked for; it gives {found} of {looked_at} looked at. "
                f"Lower --count, add pictures, or let crops overlap with --stride below {rule.stride}."
            )

    def _candidates(self, rule: CropRule) -> Iterator[Crop | None]:
        """Yield every place in the rule's order; None where there is too little tissue or too much damage."""
        rng = np.random.default_rng(rule.seed)
        places = np.concatenate([np.zeros((0, 3), np.int64), *self._places(rule, rng)])
        places = places[rng.permutation(len(places))]
        for first in range(0, len(places), _CHUNK):
            chunk = places[first : first + _CHUNK]
            crops: dict[int, Crop | None] = {}
            for i in np.argsort(chunk[:, 0], kind="stable"):
                source, y, x = (int(v) for v in chunk[i])
                crops[int(i)] = self.read(source, y, x, rule)
            yield from (crops[i] for i in range(len(chunk)))

    def _places(self, rule: CropRule, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """Yield (source, y, x) of all corners of each picture, in px of the crops."""
        for number, source in enumerate(self.sources):
            axes = []
            for side in source.size:
                room = int(side * source.mpp / rule.mpp + 1e-6) - TILE_PX
                start = int(rng.integers(0, min(rule.stride - 1, room) + 1)) if room >= 0 else 0
                axes.append(np.arange(start, room + 1, rule.stride))
            ys, xs = np.meshgrid(*axes, indexing="ij")
            yield np.stack([np.full(ys.size, number), ys.ravel(), xs.ravel()], axis=1).astype(np.int64)

    def read(self, number: int, y: int, x: int, rule: CropRule) -> Crop | None:
        """Return the crop of a picture with its corner at (y, x) px of the rule; None if it shows too little."""
        source = self.sources[number]
        try:
            with one_slide(source.name, source.path, "read"):
                slide = self._slides[source.path].get(source.path)
                step_x, step_y = slide.field(1, rule.mpp)
                region = slide.read(x * step_x, y * step_y, TILE_PX, TILE_PX, rule.mpp)
        except SlideError as error:
            if source.path not in {Path(u.path) for u in self.unusable}:
                self.unusable.append(Unusable(str(source.path), error.code, str(error)))
            return None
        pixels = np.ascontiguousarray(region.pixels.transpose(2, 0, 1))
        enough = tissue_share(pixels, rule.tissue_grey) >= rule.min_tissue
        return Crop(pixels, number, y, x) if enough and region.valid.mean() >= 1 - MAX_DAMAGED else None


def open_pictures(path: Path, mpp: float | None = None) -> PictureSet:
    """Open a run, a picture or slide, or a folder of them; `mpp` is for pictures that state no µm/px.

    Raises: EngineError if there is none that can be used; of several, those that cannot are listed.
    """
    if not path.exists():
        raise EngineError(f"{path} must be a run, a picture, a slide or a folder of them; there is nothing. Check it.")
    found, left_out = _find(path)
    if not found:
        raise EngineError(
            f"{path} must hold runs or pictures ({', '.join(SLIDE_SUFFIXES)}); it holds none. Check the path."
        )
    sources, unusable = [], [Unusable(line.partition(": ")[0], "left_out", line) for line in left_out]
    for item in found:
        try:
            with one_slide(slide_name(item), item, "opened"):
                sources.append(_source_of(item, mpp))
        except EngineError as error:
            if found == [path]:
                raise
            unusable.append(Unusable(str(item), error.code if isinstance(error, SlideError) else "run", str(error)))
    if not sources:
        raise EngineError(
            f"{path} must hold at least one picture that can be used; none of {len(unusable)} can. The first: "
            f"{unusable[0].message}"
        )
    return PictureSet(str(path), sources, unusable, mpp)


def _find(path: Path) -> tuple[list[Path], list[str]]:
    """Return runs, pictures and slides at or below a path, sorted, and lines on what was not looked through."""
    if path.is_file() or _is_picture(path):
        return [path], []
    found = look_through(path, lambda p: _is_picture(p) and p.name != CONTACT_SHEET)
    return sorted(found.paths), found.left_out


def _is_picture(path: Path) -> bool:
    if (path / "state.json").is_file() or path.suffix.lower() == ".zarr":
        return True
    return path.is_file() and path.suffix.lower() in SLIDE_SUFFIXES


def _source_of(path: Path, mpp: float | None) -> Source:
    """Raises: SlideError; EngineError for a run that is not finished."""
    if (path / "state.json").is_file():
        image = FinishedRun(path).picture()
        codec = "decoded by a model, stored without loss"
        return Source(path.name, path / IMAGE, image.mpp_um, image.sizes[0], codec, path)
    with open_slide(path, mpp=mpp) as slide:
        resolution = slide.resolution
        size = slide.height, slide.width
        return Source(
            slide_name(path), path, float(np.sqrt(resolution.mpp_x * resolution.mpp_y)), size, codec_of(slide)
        )


def check_scale(sets: Sequence[PictureSet], mpp: float | None) -> float:
    """Return the µm/px of the crops: `mpp`, or the one that all pictures have.

    Pictures coarser than that leave their set, and are listed.
    Raises: EngineError if `mpp` is None and they differ, or if a set loses all its pictures.
    """
    if mpp is None:
        found = sorted({s.mpp for one in sets for s in one.sources})
        if found[-1] > found[0] * (1 + SAME_MPP):
            told = "; ".join(f"{one.where}: {_span([s.mpp for s in one.sources])} µm/px" for one in sets)
            raise EngineError(
                f"the sets must have one µm/px, or figures compare scales and not tissue; got {told}. Name the one to "
                "read all of them at with --crop_mpp: finer pictures are reduced to it."
            )
        mpp = found[0]
    for one in sets:
        one.drop_coarser(mpp)
    return mpp


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if high <= low * (1 + SAME_MPP) else f"{low:g} to {high:g}"


def codec_of(slide: Slide) -> str:
    """Return what a file says of its compression: "jpeg, quality about 90", "png", "tiff deflate", …"""
    path = slide.path
    suffix = path.suffix.lower()
    if suffix in (".jpg", ".jpeg"):
        with PIL.Image.open(path) as image:
            table = getattr(image, "quantization", {}).get(0)
        if not table:
            return "jpeg"
        scale = 100 * sum(table) / _LUMINANCE_SUM
        return f"jpeg, quality about {(200 - scale) / 2 if scale <= 100 else 5000 / scale:.0f}"
    if suffix in (".tif", ".tiff", ".svs"):
        try:
            with tifffile.TiffFile(path) as tiff:
                page = tiff.series[slide.choice.index].keyframe
                which = f", series {slide.choice.index} of several" if slide.choice.doubtful else ""
                return f"tiff {tifffile.COMPRESSION(page.compression).name.lower()}{which}"
        except UNREADABLE:
            return f"tiff, compression unknown ({slide.reader})"
    return "png" if suffix == ".png" else slide.reader
