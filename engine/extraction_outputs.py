"""What an extraction leaves per slide: bags, thumbnail, tissue. The only writer of a run folder.

Invariant: a block that was taken survives a kill; files appear whole. It does not know how vectors come about.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine import __version__
from engine.bag_plan import check_slide_name
from engine.bag_writer import BagWriter, written
from engine.bags import BagAttributes, BagFile, BagPlan, BagScale, bag_path
from engine.errors import BagError, BagMismatchError
from engine.extraction_blocks import BlockFeatures, SlidePlan, SlideTask
from engine.extraction_config import ExtractConfig
from engine.extraction_encoders import EncoderFacts
from engine.extraction_report import SlideRecord
from engine.slide_outputs import OpenSlide, Outputs
from engine.slide_report import DONE
from engine.slides.grid import PARENT_FACTOR
from engine.slides.table import note_on
from engine.slides.tissue_geojson import write_tissue
from engine.state import write_atomically

THUMBNAILS, TISSUE = "thumbnails", "tissue"


@dataclass
class _OpenSlide(OpenSlide):
    plan: SlidePlan
    writers: dict[str, BagWriter]
    damaged: int = 0


class ExtractionOutputs(Outputs[SlidePlan, BlockFeatures, _OpenSlide, SlideRecord]):
    """Writes what arrives; knows which slides are under way."""

    def __init__(
        self, folder: Path, config: ExtractConfig, names: tuple[str, str], encoders: Mapping[str, EncoderFacts]
    ) -> None:
        super().__init__(folder, config.blocks.slide_damage)
        self.config, self.names, self.encoders = config, names, encoders

    def task(self, slide: str, path: Path) -> SlideTask | None:
        """Return what of a slide is to do, or None if nothing is missing.

        Raises: BagError for a name that cannot be used; BagMismatchError if its bag was made with other settings.
        """
        check_slide_name(slide)
        todo = [name for name in self.encoders if not self._has_bag(name, slide)]
        beside = (self.folder / THUMBNAILS / f"{slide}.jpg", self.folder / TISSUE / f"{slide}.geojson")
        if not todo and all(p.is_file() for p in beside):
            return None
        return SlideTask(slide, path, tuple(written(self._bag(name, slide), self.names) for name in todo))

    def record(self, slide: str, path: Path, status: str) -> SlideRecord:
        """Return the record of a slide of which this run knows no more."""
        return SlideRecord(slide, str(path), status)

    def _opened(self, plan: SlidePlan, waiting: int, started: float) -> _OpenSlide:
        writers = {}
        for name, facts in self.encoders.items():
            if not self._has_bag(name, plan.slide):
                writers[name] = BagWriter(self._bag(name, plan.slide), self._bag_plan(plan, facts))
        write_tissue(self._beside(TISSUE, plan.slide, ".geojson"), plan.tissue)
        write_atomically(self._beside(THUMBNAILS, plan.slide, ".jpg"), plan.thumbnail)
        return _OpenSlide(plan, waiting, started, writers)

    def _store(self, slide: _OpenSlide, block: BlockFeatures) -> None:
        for name, writer in slide.writers.items():
            for scale in reversed(self.names):
                writer.write(scale, block.first[scale], block.vectors[name][scale], block.valid[scale])
        slide.damaged += block.damaged

    def _damage(self, slide: _OpenSlide) -> tuple[int, int]:
        """Return how many tiles at 20x are masked, and of how many."""
        return self._masked(slide)[0], len(slide.plan.grid)

    def _finished(self, slide: _OpenSlide) -> SlideRecord:
        masked = self._masked(slide)
        for writer in slide.writers.values():
            writer.finish()
        return self._record(slide, masked)

    def _masked(self, slide: _OpenSlide) -> tuple[int, int]:
        """Return how many tiles of both scales are not valid."""
        for writer in slide.writers.values():
            return writer.masked(self.names[0]), writer.masked(self.names[1])
        with BagFile(self._bag(next(iter(self.encoders)), slide.plan.slide)) as bag:
            return int((~bag.valid(self.names[0])).sum()), int((~bag.valid(self.names[1])).sum())

    def _record(self, slide: _OpenSlide, masked: tuple[int, int]) -> SlideRecord:
        plan = slide.plan
        code, message = note_on(plan.slide, len(plan.grid), plan.resolution)
        return SlideRecord(
            slide=plan.slide,
            path=str(plan.path),
            status=DONE,
            code=code,
            message=message,
            tiles_20x=len(plan.grid),
            tiles_5x=len(plan.grid.parent_coords),
            masked_20x=masked[0],
            masked_5x=masked[1],
            damaged_blocks=slide.damaged,
            tissue_share=plan.tissue.total_share,
            mpp_x=plan.resolution.mpp_x,
            mpp_y=plan.resolution.mpp_y,
            mpp_source=plan.resolution.source,
            reader=plan.reader,
            seconds=slide.seconds,
        )

    def _bag_plan(self, plan: SlidePlan, facts: EncoderFacts) -> BagPlan:
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
