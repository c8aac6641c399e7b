"""Plan, read and encode in this process, one block read ahead; the specification of every other crew.

It does not know bags. Same functions as on Ray, so the same features.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from engine.extraction import Crew
from engine.extraction_blocks import BlockEncoder, BlockPixels, Message, SlideFailure, SlidePlan, SlideTask, SlideWorker
from engine.extraction_config import ExtractConfig
from engine.extraction_encoders import load_encoders
from engine.run import choose_device, pin_arithmetic


@contextmanager
def extract_alone(config: ExtractConfig, names: tuple[str, str]) -> Iterator[Crew]:
    """Compute here, without Ray (ray.enabled=false)."""
    device = choose_device(config.model.device)
    pin_arithmetic(config.model.threads)
    worker, encoder = SlideWorker(config, names), BlockEncoder(load_encoders(config, device))
    yield Crew(lambda tasks: _work(worker, encoder, tasks), device, lambda: 1)


def _work(worker: SlideWorker, encoder: BlockEncoder, tasks: Sequence[SlideTask]) -> Iterator[Message]:
    source = _pixels(worker, tasks)
    with ThreadPoolExecutor(1) as ahead:  # reading releases the interpreter: the next block is read meanwhile
        coming = ahead.submit(next, source, None)
        while (item := coming.result()) is not None:
            coming = ahead.submit(next, source, None)
            yield encoder.encode(item) if isinstance(item, BlockPixels) else item


def _pixels(worker: SlideWorker, tasks: Sequence[SlideTask]) -> Iterator[SlidePlan | BlockPixels | SlideFailure]:
    """Yield plans, pixels and failures; of a slide that failed, nothing more."""
    for task in tasks:
        for planned in worker.plan(task):
            if isinstance(planned, SlidePlan | SlideFailure):
                yield planned
                continue
            pixels = worker.read(planned)
            yield pixels
            if isinstance(pixels, SlideFailure):
                break
