"""What an extraction leaves per slide: bags, thumbnail, tissue, its line in the report. The only writer of the folder.

Invariant: a block that was taken survives a kill; files appear whole. It does not know how vectors come about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import __version__
from engine.core.errors import BagError, BagMismatchError
from engine.core.files import write_atomically
from engine.features.bag_reader import BagAttributes, BagFile, BagPlan, BagScale, bag_path
from engine.features.bag_writer import BagWriter, written
from engine.features.blocks import BlockFeatures, ExtractPlan, ExtractTask
from engine.features.config import ExtractConfig
from engine.features.encoders import EncoderFacts
from engine.pipeline.report import SLIDE_DONE, Facts, OpenedRecord, Record, slide_table, write_page_of
from engine.pipeline.stages import BlockResult, SlidePlan
from engine.slides.geojson import write_tissue
from engine.slides.inspect import note_on
from engine.slides.slide import check_slide_name
from engine.slides.tile_grid import PARENT_FACTOR


@dataclass(frozen=True)
class SlideRecord(OpenedRecord):
    """What became of one slide."""

    tiles_20x: int | None = None
    """Of the fine scale."""
    tiles_5x: int | None = None
    """Of the coarse scale."""
    masked_20x: int = 0
    masked_5x: int = 0
    """Tiles whose pixels are damaged: `valid` 0."""
    damaged_blocks: int = 0
    """Blocks of the file that could not be decoded, in this run: while tissue was looked for, and of the tiles."""


def as_slides(records: Sequence[Record]) -> list[SlideRecord]:
    """Return the records of an extraction as what they are."""
    return [record for record in records if isinstance(record, SlideRecord)]


def write_page(folder: Path, records: Sequence[Record], facts: Facts) -> None:
    """Write report.html."""
    header = ("20x", "5x", "masked", "tissue", "µm/px", "from", "reader", "s")
    values = {r.path: _values(r) for r in as_slides(records)}
    parts = ["<h2>Slides</h2>", slide_table(folder, header, records, values)]
    write_page_of(folder, "Features", records, facts, parts)


def _values(r: SlideRecord) -> tuple[object, ...]:
    return r.tiles_20x, r.tiles_5x, f"{r.masked_20x} + {r.masked_5x}", *r.shown()


THUMBNAILS, TISSUE = "thumbnails", "tissue"


class ExtractionFolder:
    """The folder of an extraction: a bag per encoder and slide, a thumbnail and the tissue of each slide."""

    def __init__(
        self, folder: Path, config: ExtractConfig, names: tuple[str, str], encoders: Mapping[str, EncoderFacts]
    ) -> None:
        self.folder, self.config, self.names, self.encoders = folder, config, names, encoders

    def task(self, slide: str, path: Path) -> ExtractTask | None:
        """Return what of a slide is to do, or None if nothing is missing.

        Raises: BagError for a name that cannot be used; BagMismatchError if its bag was made with other settings.
        """
        check_slide_name(slide)
        todo = [name for name in self.encoders if not self._has_bag(name, slide)]
        beside = (self.folder / THUMBNAILS / f"{slide}.jpg", self.folder / TISSUE / f"{slide}.geojson")
        if not todo and all(p.is_file() for p in beside):
            return None
        return ExtractTask(slide, path, tuple(written(self._bag(name, slide), self.names) for name in todo))

    def record(self, slide: str, path: Path, status: str) -> SlideRecord:
        """Return the record of a slide of which this run knows no more."""
        return SlideRecord(slide, str(path), status)

    def writer(self, plan: SlidePlan) -> "BagsOfSlide":
        """Write thumbnail and tissue; return the writer of the bags that are missing."""
        assert isinstance(plan, ExtractPlan)  # our own workers made it
        writers = {}
        for name, facts in self.encoders.items():
            if not self._has_bag(name, plan.slide):
                writers[name] = BagWriter(self._bag(name, plan.slide), self._bag_plan(plan, facts))
        write_tissue(self._beside(TISSUE, plan.slide, ".geojson"), plan.tissue)
        write_atomically(self._beside(THUMBNAILS, plan.slide, ".jpg"), plan.thumbnail)
        return BagsOfSlide(plan, self.names, writers, self._bag(next(iter(self.encoders)), plan.slide))

    def _bag_plan(self, plan: ExtractPlan, facts: EncoderFacts) -> BagPlan:
        grid, (fine, coarse) = plan.grid, self.names
        attributes = BagAttributes(
            slide=plan.slide,
            mpp_x=plan.resolution.mpp_x,
            mpp_y=plan.resolution.mpp_y,
            mpp_source=plan.resolution.source,
            level0_width=plan.size[0],
            level0_height=plan.size[1],
            reader=plan.reader,
            code_version=__version__,
            synthetic=self.config.synthetic,
            objective=plan.objective,
            series=plan.choice.index if plan.choice.told else None,
            **facts.attributes,
        )
        wide = grid.field[0] * PARENT_FACTOR, grid.field[1] * PARENT_FACTOR
        scales = (
            BagScale(fine, grid.mpp, grid.field, grid.coords, grid.parent),
            BagScale(coarse, grid.mpp * PARENT_FACTOR, wide, grid.parent_coords),
        )
        return BagPlan(attributes, scales, facts.dim, self.config.precision)

    def _bag(self, encoder: str, slide: str) -> Path:
        """Return the path of a bag. Raises BagError if it or its blocks would lie elsewhere."""
        folder = self.folder / self.config.folder_of(encoder)
        path = bag_path(folder, slide)
        blocks = path.with_name(path.name + ".blocks")
        if blocks.is_symlink() or folder.is_symlink():
            raise BagError(f"{blocks} must lie in {self.folder}; it is, or lies in, a link. Remove the link.")
        return path

    def _has_bag(self, encoder: str, slide: str) -> bool:
        """Say whether a whole bag of these settings is there; a damaged one is made again."""
        path = self._bag(encoder, slide)
        if not path.exists():
            return False
        try:
            with BagFile(path) as bag:
                found, scales = bag.attributes, bag.scales
        except BagMismatchError:
            raise
        except BagError:
            return False
        expected = {**self.encoders[encoder].attributes, "synthetic": self.config.synthetic}
        differing = [f"{k} was {getattr(found, k)!r}, now {v!r}" for k, v in expected.items() if getattr(found, k) != v]
        if scales != self.names:
            differing.append(f"scales were {scales}, now {self.names}")
        if differing:
            raise BagMismatchError(
                f"{path} was made with other settings: {'; '.join(differing)}. Use another --out, or remove it."
            )
        return True

    def _beside(self, kind: str, slide: str, suffix: str) -> Path:
        """Return the path of a slide's file of another kind. A link there is replaced, not followed."""
        (self.folder / kind).mkdir(parents=True, exist_ok=True)
        return self.folder / kind / (slide + suffix)


class BagsOfSlide:
    """Writes the bags of one slide."""

    def __init__(
        self, plan: ExtractPlan, names: tuple[str, str], writers: Mapping[str, BagWriter], first: Path
    ) -> None:
        """`writers` are those of the bags that are missing, by encoder; `first` is the bag of the first encoder."""
        self.plan, self.names, self.writers, self.first = plan, names, writers, first
        self.damaged_blocks = plan.damaged

    def store(self, block: BlockResult) -> None:
        assert isinstance(block, BlockFeatures)
        for name, writer in self.writers.items():
            for scale in reversed(self.names):
                writer.write(scale, block.first[scale], block.vectors[name][scale], block.valid[scale])
        self.damaged_blocks += block.damaged

    def damage(self) -> tuple[int, int]:
        """Return how many tiles at 20x are masked, and of how many."""
        return self._masked()[0], len(self.plan.grid)

    def finish(self, seconds: float) -> SlideRecord:
        masked = self._masked()
        for writer in self.writers.values():
            writer.finish()
        plan = self.plan
        how = plan.resolution, plan.choice, plan.tissue.lost, masked[0]
        code, message = note_on(plan.slide, len(plan.grid), *how)
        return SlideRecord(
            slide=plan.slide,
            path=str(plan.path),
            status=SLIDE_DONE,
            code=code,
            message=message,
            tiles_20x=len(plan.grid),
            tiles_5x=len(plan.grid.parent_coords),
            masked_20x=masked[0],
            masked_5x=masked[1],
            damaged_blocks=self.damaged_blocks,
            unseen_share=plan.tissue.lost,
            picture=plan.choice.told,
            tissue_share=plan.tissue.total_share,
            mpp_x=plan.resolution.mpp_x,
            mpp_y=plan.resolution.mpp_y,
            mpp_source=plan.resolution.source,
            reader=plan.reader,
            seconds=seconds,
        )

    def _masked(self) -> tuple[int, int]:
        """Return how many tiles of both scales are not valid."""
        for writer in self.writers.values():
            return writer.masked(self.names[0]), writer.masked(self.names[1])
        with BagFile(self.first) as bag:
            return int((~bag.valid(self.names[0])).sum()), int((~bag.valid(self.names[1])).sum())
