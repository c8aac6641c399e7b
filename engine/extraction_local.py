"""What a process needs to do its part of an extraction, and the crew that is this process alone. It knows no bags."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from engine.extraction_blocks import BlockEncoder, BlockPixels, SlideWorker, TileBlock
from engine.extraction_config import ExtractConfig
from engine.extraction_encoders import load_encoders
from engine.slide_crew import Crew, work_alone


@dataclass(frozen=True)
class ExtractStages:
    """Slides → plans and blocks → pixels → vectors, at two magnifications."""

    config: ExtractConfig
    names: tuple[str, str]
    block: ClassVar[type] = TileBlock
    pixels: ClassVar[type] = BlockPixels

    def worker(self) -> SlideWorker:
        return SlideWorker(self.config, self.names)

    def encoder(self, device: str) -> BlockEncoder:
        return BlockEncoder(load_encoders(self.config, device))


@contextmanager
def extract_alone(config: ExtractConfig, names: tuple[str, str]) -> Iterator[Crew]:
    """Compute here, without Ray (ray.enabled=false)."""
    with work_alone(ExtractStages(config, names)) as crew:
        yield crew
