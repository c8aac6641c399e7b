"""Slides from Python: features and training sets of a folder of slides.

Nothing here reads a command line or ends the process; mistakes raise EngineError.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from engine._backends.sampling import ask_hardware
from engine._backends.slides import extract_on_ray, prepare_on_ray
from engine.api.runs import BackendName, chosen_backend, shown_progress
from engine.core.cli import configured
from engine.core.errors import ConfigError, EngineError
from engine.datasets.config import PrepareConfig
from engine.datasets.dataset import PreparedSet
from engine.datasets.prepare import prepare
from engine.features.bag_reader import BagFile, find_bags
from engine.features.config import ExtractConfig
from engine.features.encoders import extract_alone
from engine.features.extract import extract
from engine.pipeline.report import SLIDE_FAILED, Record
from engine.pipeline.stages import local_backend
from engine.slides.slide import ARRAYS, Slide


class SlidesFailedError(EngineError):
    """Some slides could not be used; the others are done. `failed` maps their names to (reason code, message)."""

    def __init__(self, out: Path, records: Sequence[Record]) -> None:
        self.failed = {r.slide: (r.code, r.message) for r in records}
        named = "; ".join(f"{name} ({code})" for name, (code, _) in list(self.failed.items())[:5])
        super().__init__(
            f"all slides must be usable; {len(records)} are not: {named}. The others are in {out}. Mend these, or pass "
            "skip_failed=True."
        )


def extract_features(
    slides: str | Path | Sequence[Slide],
    out: str | Path,
    *,
    encoders: Sequence[str] = ("zoomldm",),
    config: str | Path | None = None,
    backend: BackendName = "auto",
    progress: bool = True,
    skip_failed: bool = False,
    **changes: Any,
) -> list[BagFile]:
    """Extract features of a folder of slides at two magnifications; return the bags of the first encoder, by slide.

    `slides` may be open slides instead, such as `Slide.from_array` makes; they are worked on in this process.
    `changes` are keys of `python -m engine.extract_features`, sections as mappings. What `out` holds already is not
    made again. Raises: SlidesFailedError when some slides cannot be used, unless `skip_failed`; EngineError.

    >>> import engine, numpy as np
    >>> tissue = np.random.default_rng(0).integers((150, 50, 130), (220, 130, 200), (1024, 1024, 3)).astype(np.uint8)
    >>> slide = engine.Slide.from_array(tissue, mpp=0.5, name="case_7")
    >>> (bag,) = engine.extract_features([slide], "runs/features", encoders=["texture"], progress=False)
    >>> bag.scales, bag.features("20x").shape
    (('20x', '5x'), (16, 120))
    """
    given = () if isinstance(slides, str | Path) else tuple(slides)
    folder = ARRAYS if given else str(slides)
    keys = {"slides": folder, "out": str(out), "encoders": list(encoders), **changes}
    asked = configured(ExtractConfig, config, keys)
    asked = replace(asked, ray=chosen_backend(asked.ray, "local" if given and backend == "auto" else backend))
    if given and asked.ray.enabled:
        raise ConfigError(
            "slides that are open must be worked on in the process that holds them; got backend='ray'. Pass "
            "backend='local', or a folder of slides."
        )
    alone = partial(extract_alone, given=given)
    start = extract_on_ray if asked.ray.enabled else alone
    paths = [slide.path for slide in given] or None
    records = extract(asked, start, shown_progress(progress), ask=ask_hardware(asked), paths=paths)
    _check(Path(out), records, skip_failed)
    return [BagFile(path) for path in find_bags(Path(out) / "features")]


def prepare_dataset(
    slides: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    backend: BackendName = "auto",
    progress: bool = True,
    skip_failed: bool = False,
    **changes: Any,
) -> PreparedSet:
    """Prepare a multi-scale training set of a folder of slides; return it.

    `changes` are keys of `python -m engine.prepare`, sections as mappings. Raises: SlidesFailedError when some slides
    cannot be used, unless `skip_failed`; EngineError.

    >>> import engine, numpy as np, PIL.Image
    >>> from pathlib import Path
    >>> Path("slides").mkdir(exist_ok=True)
    >>> tissue = np.random.default_rng(0).integers((150, 50, 130), (220, 130, 200), (512, 512, 3)).astype(np.uint8)
    >>> PIL.Image.fromarray(tissue).save("slides/case_7.png")
    >>> place = {"out": "runs/set", "backend": "local", "progress": False}
    >>> found = engine.prepare_dataset("slides", **place, mpp=0.5, coarsest="1.25x")
    >>> {name: found.count(level) for level, name in enumerate(found.magnifications)}
    {'20x': 4, '10x': 1, '5x': 0, '2.5x': 0, '1.25x': 0}
    """
    asked = configured(PrepareConfig, config, {"slides": str(slides), "out": str(out), **changes})
    asked = replace(asked, ray=chosen_backend(asked.ray, backend))
    start = prepare_on_ray if asked.ray.enabled else local_backend
    records = prepare(asked, start, shown_progress(progress), ask=ask_hardware(asked))
    _check(Path(out), records, skip_failed)
    return PreparedSet(Path(out))


def _check(out: Path, records: Sequence[Record], skip_failed: bool) -> None:
    failed = [record for record in records if record.status == SLIDE_FAILED]
    if failed and not skip_failed:
        raise SlidesFailedError(out, failed)
