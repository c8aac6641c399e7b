"""The order of a comparison: sets, encoder, crops, vectors, figures, canvases, single patches.

It does not know pages or command lines; `Comparison` holds all that quality.json says.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine import __version__
from engine.core.errors import EngineError
from engine.core.progress import Progress
from engine.core.runtime import choose_device, pin_arithmetic
from engine.evaluation.baseline import Baseline, draw_baseline
from engine.evaluation.canvas import (
    DISTANCE_LIMIT,
    Canvas,
    Verdict,
    at_most,
    canvas_verdicts,
    cells_of,
    detail_verdicts,
    judge_canvas,
)
from engine.evaluation.config import QualityConfig
from engine.evaluation.measures.distances import frechet_distance, kernel_distance
from engine.evaluation.measures.figures import Figure, kid_size, memory_figure, pair_figure, set_figures
from engine.evaluation.samples.encoders import open_encoder
from engine.evaluation.samples.references import pair_vectors, training_vectors
from engine.evaluation.samples.sets import PictureSet, Unusable, check_scale, open_pictures
from engine.evaluation.samples.vectors import (
    BLUR_PX,
    VectorSet,
    check_encoders,
    encode,
    encode_set,
    holds_bags,
    read_bags,
)
from engine.images.detail import flags, ratios
from engine.model.encoders.base import SSLEncoder


@dataclass
class Comparison:
    """All that was found."""

    config: QualityConfig
    facts: dict[str, Any] = field(default_factory=dict)
    """What must be said beside any figure: encoder, digest, µm/px, crop rule, codecs, seed."""
    figures: list[Figure] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)
    canvases: list[Canvas] = field(default_factory=list)
    patches: dict[str, Any] = field(default_factory=dict)
    memorisation: dict[str, Any] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)
    table: list[Any] = field(default_factory=list)
    """Rows of a paper's protocol."""
    sets: list[VectorSet] = field(default_factory=list)
    baseline: Baseline | None = None

    def record(self) -> dict[str, Any]:
        """Return what quality.json holds; every figure carries the facts, so that none can be quoted without."""
        return {
            "version": __version__,
            "facts": self.facts,
            "figures": [{**asdict(figure), **self.facts} for figure in self.figures],
            "detail": self.detail,
            "table": [{**asdict(row), **self.facts} for row in self.table],
            "canvases": [asdict(canvas) for canvas in self.canvases],
            "patches": self.patches,
            "memorisation": self.memorisation,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "warnings": self.warnings,
            "unusable": [dict(u._asdict()) for u in self.unusable],
            "config": asdict(self.config),
        }


def compare(config: QualityConfig, progress: Progress) -> Comparison:
    """Compare A with B, or look at A alone.

    Raises: EngineError with what the user can do; ValueError for what the config cannot ask for.
    """
    pin_arithmetic(config.threads)
    found = Comparison(config)
    paths = [Path(p) for p in (config.a, config.b) if p is not None]
    for path in paths:
        if not path.exists():
            raise EngineError(f"{path} must be a run, a picture, a slide, bags or a folder of them; there is nothing.")
    pictures = {path: open_pictures(path, config.mpp) for path in paths if not holds_bags(path)}
    encoder = _encoder(config) if pictures else None
    digest = encoder.digest if encoder is not None else ""
    mpp = check_scale(list(pictures.values()), config.crop_mpp) if pictures else config.crop_mpp
    for i, path in enumerate(paths):
        progress.say(f"{'AB'[i]}: {path}")
        if path in pictures and encoder is not None and mpp is not None:
            rule = config.rule(mpp)
            # The ceiling is made of B.
            found.sets.append(encode_set(pictures[path], rule, encoder, digest, i == 1, config.batch))
        else:
            found.sets.append(read_bags(path, mpp, config.count, config.seed))
            mpp = mpp or found.sets[-1].mpp
    check_encoders(found.sets)
    found.facts = _facts(config, found.sets, mpp)
    found.unusable = [u for one in found.sets for u in one.unusable]
    if len(found.sets) == 2:
        _compare_sets(found)
        if encoder is not None and mpp is not None:
            _compare_further(found, [pictures.get(path) for path in paths], encoder, mpp, progress)
    first = pictures.get(paths[0])
    if first is not None and first.runs and encoder is not None:
        _judge_runs(found, first, encoder, progress)
    return found


def _encoder(config: QualityConfig) -> SSLEncoder:
    return open_encoder(*config.seen_by, choose_device(config.device))


def _facts(config: QualityConfig, sets: list[VectorSet], mpp: float | None) -> dict[str, Any]:
    pixels = all(one.detail is not None for one in sets)
    facts: dict[str, Any] = {
        "encoder": sets[0].encoder,
        "encoder_sha256": sets[0].digest,
        "mpp": mpp,
        "crop_rule": config.rule(mpp).said() if pixels and mpp is not None else "vectors as they were extracted",
        "codec_history": {"AB"[i]: one.codecs for i, one in enumerate(sets)},
        "seed": config.seed,
    }
    if len(sets) == 2:
        facts["floor_is"] = "half of B against the other half"
        facts["ceiling_is"] = f"half of B, blurred by {BLUR_PX:g} px, against the other half"
    return facts


def _compare_sets(found: Comparison) -> None:
    (a, b), config = found.sets, found.config
    if abs(a.mpp / b.mpp - 1) > 0.01:
        raise EngineError(f"both sets must have one µm/px; got {a.mpp:g} and {b.mpp:g}. Name one with --crop_mpp.")
    if min(len(a), len(b)) < 2:
        raise EngineError(
            f"each set must give at least two crops, or it has no spread; got {len(a)} and {len(b)}. Add pictures, or "
            "let crops overlap with a smaller --stride."
        )
    found.figures = set_figures(a, b, config)
    found.warnings += [f"{figure.name}: {figure.note}" for figure in found.figures[:1] if "below" in figure.note]
    lossy = [any("jpeg" in codec for codec in one.codecs) for one in (a, b)]
    if lossy[0] != lossy[1]:
        found.warnings.append(
            f"{'AB'[lossy.index(True)]} went through JPEG and {'AB'[lossy.index(False)]} did not: figures count that "
            "as a difference of pictures. Compress both alike."
        )
    if a.detail is not None and b.detail is not None:
        found.detail = {"a": asdict(a.detail), "b": asdict(b.detail), "a_relative_to_b": ratios(a.detail, b.detail),
                        "flags": flags(a.detail, b.detail)}  # fmt: skip


def _compare_further(
    found: Comparison, sets: list[PictureSet | None], encoder: SSLEncoder, mpp: float, progress: Progress
) -> None:
    """Add what needs pixels: pairs, and the training set."""
    config, (a, b) = found.config, sets
    rule = config.rule(mpp)
    if config.paired:
        if a is None or b is None:
            raise EngineError("pairs are pictures at one place; A or B holds features. Leave --paired out.")
        found.figures.append(pair_figure(*pair_vectors(a, b, rule, encoder, config.batch), config.seed))
    if config.training is not None:
        progress.say(f"training set: {config.training}")
        where = Path(config.training)
        vectors = training_vectors(where, rule, config.mpp, encoder, found.sets[0].digest, config.batch)
        figure, said = memory_figure(found.sets[0], found.sets[1], vectors)
        found.figures.append(figure)
        found.memorisation = {"training": config.training, "n": len(vectors), **said}


def _judge_runs(found: Comparison, pictures: PictureSet, encoder: SSLEncoder, progress: Progress) -> None:
    config = found.config
    for run in pictures.runs:
        canvas = judge_canvas(run, config.tissue_grey, encoder, config.batch)
        found.canvases.append(canvas)
        found.verdicts += canvas_verdicts(canvas)
    if not config.patches:
        return
    progress.say(f"drawing {config.patches} single patches")
    base = found.baseline = draw_baseline(pictures.runs, config.patches, config.seed, config.device)
    if len(base.patches) < config.patches:
        found.warnings.append(
            f"{config.patches} single patches were asked for; the runs have {len(base.patches)} cells."
        )
    verdicts, said = detail_verdicts(*base.details(config.tissue_grey))
    found.patches = {"n": len(base.patches), "drawn": base.said, "mpp": base.mpp, "detail": said}
    found.verdicts += verdicts
    if len(found.sets) == 2:
        _compare_distances(found, base, encoder)


def _compare_distances(found: Comparison, base: Baseline, encoder: SSLEncoder) -> None:
    """Set the canvas' distances from B against those of single patches of the same cells, as many of each."""
    config, b = found.config, found.sets[1]
    if abs(base.mpp / b.mpp - 1) > 0.01:
        found.warnings.append(
            f"single patches have {base.mpp:g} µm/px and the crops {b.mpp:g}: their distances were not compared."
        )
        return
    kept = cells_of(base, config.tissue_grey, config.min_tissue)
    n = int(kept.sum())
    if n < 4:
        found.warnings.append(f"{n} cells show tissue: too few to compare distances of canvas and patches.")
        return
    canvas, patches = (encode(encoder, p[kept], config.batch) for p in (base.canvas, base.patches))
    size = kid_size(config, n, len(b))
    values: dict[str, dict[str, float]] = {"frechet": {}, "kid": {}}
    for name, vectors in (("canvas", canvas), ("patches", patches)):
        values["frechet"][name] = frechet_distance(vectors, b.vectors)
        values["kid"][name] = kernel_distance(vectors, b.vectors, config.kid_subsets, size, config.seed).value
    for name, pair in values.items():
        of, beside = pair["canvas"], pair["patches"]
        # A KID of about zero or below says "no difference": a ratio to it says nothing.
        ratio = of / beside if beside > 0 else None
        met = at_most(ratio, DISTANCE_LIMIT)
        title = "Fréchet distance" if name == "frechet" else "KID"
        found.verdicts.append(
            Verdict(f"{title} relative to single patches ({n} cells)", ratio, f"<= {DISTANCE_LIMIT}", met)
        )
    found.patches |= {"distances": values, "cells_with_tissue": n, "kid_subset": size}


def shown_pairs(found: Comparison) -> list[tuple[str, np.ndarray]]:
    """Return what a page shows beside each other: names and crops, uint8 (n, 3, 256, 256)."""
    rows = [
        (f"{'AB'[i]}: {one.where}", np.stack([crop.pixels for crop in one.shown]))
        for i, one in enumerate(found.sets)
        if one.shown
    ]
    if found.baseline is not None:
        rows += [
            ("cells of the canvas", found.baseline.canvas[:8]),
            ("single patches of the same conditions", found.baseline.patches[:8]),
        ]
    return rows
