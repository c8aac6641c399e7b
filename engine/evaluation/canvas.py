"""What a run's canvas tells by itself: seams, agreement with its guide, detail, likeness to its conditions.

Invariant: seams and agreement are those its report holds, which were computed when it was made. It does not know other
sets; what single patches of the model would show comes in as a Baseline.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import EngineError
from engine.evaluation.baseline import Baseline, condition_cells
from engine.evaluation.measures.figures import Figure, pair_figure
from engine.evaluation.samples.vectors import encode
from engine.generation.finished_run import FinishedRun
from engine.generation.outputs import REPORT
from engine.generation.run import describe, stored_config
from engine.images.detail import Detail, detail_of, flags, ratios
from engine.model.encoders.base import SSLEncoder
from engine.model.encoders.registry import DEMO

SEAM_LIMIT, AGREEMENT_LIMIT_DB, DETAIL_LIMIT, DISTANCE_LIMIT = 1.05, 20.0, 0.9, 1.15
"""What a canvas is held to: seams up to, agreement from (dB), gradient and dark share of single patches from, and
Fréchet distance and KID relative to those of single patches up to."""
COMPARED = 256
"""Cells of a canvas that are compared with their conditions, at most."""


@dataclass(frozen=True)
class Canvas:
    """One run."""

    run: str
    seam_score: float | None
    seam_control: float | None
    """What the same picture scores off its borders, at most in 19 of 20 places; None in reports of earlier releases."""
    consistency_psnr_db: float | None
    detail: Detail
    similarity: Figure | None
    """Mean cosine of the canvas' cells, encoded, and their conditions."""
    note: str = ""


def judge_canvas(folder: Path, tissue_grey: float, encoder: SSLEncoder | None, batch: int) -> Canvas:
    """Measure the canvas of a finished run. Raises: EngineError if it is not finished or its report is not whole."""
    finished = FinishedRun(folder)
    report = _read_report(folder / REPORT)
    similarity, note = None, "no encoder asked for"
    if encoder is not None:
        section = stored_config(finished.root.folder).model
        wanted = describe(section).encoder
        note = f"the conditions are vectors of {wanted}, the encoder is {encoder.id}"
        # A model of one's own may carry a demo encoder of its own: the same name, other vectors.
        if wanted == encoder.id and (wanted != DEMO or section.source == DEMO):
            conditions, cells = condition_cells(finished, COMPARED)
            note = f"{len(cells)} cells"
            if len(cells) > 1:
                name = "embedding similarity to conditions"
                similarity = pair_figure(encode(encoder, cells, batch), conditions, 0, name)
    seam, agreement = report.get("seam_score"), report.get("consistency_psnr_db")
    detail = detail_of(finished.picture(), tissue_grey)
    return Canvas(folder.name, seam, report.get("seam_control"), agreement, detail, similarity, note)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} must be a run's report; {error}. Run the run's command again.") from error


@dataclass(frozen=True)
class Verdict:
    """One requirement of a canvas and whether it is met; None: it cannot be said."""

    name: str
    value: float | None
    limit: str
    met: bool | None


def detail_verdicts(canvas: Detail, patches: Detail) -> tuple[list[Verdict], dict[str, Any]]:
    """Hold the canvas' cells to single patches of the same cells; returns what the report says of it, too."""
    relative = ratios(canvas, patches)
    said = flags(canvas, patches)
    verdicts = [
        Verdict(f"{name} relative to single patches", relative[name], f">= {DETAIL_LIMIT}", at_least(relative[name]))
        for name in ("gradient", "dark_share")
    ]
    verdicts.append(Verdict("nothing flagged: noise, grids, blocks", float(len(said)), "0", not said))
    return verdicts, {"ratios": relative, "flags": said, "canvas": asdict(canvas), "patches": asdict(patches)}


def at_least(value: float | None, limit: float = DETAIL_LIMIT) -> bool | None:
    return None if value is None else bool(value >= limit)


def at_most(value: float | None, limit: float) -> bool | None:
    return None if value is None else bool(value <= limit)


def canvas_verdicts(canvas: Canvas) -> list[Verdict]:
    """Hold seams and agreement to their limits; seams also to lines without any, for small canvases scatter."""
    limit = max(SEAM_LIMIT, canvas.seam_control or 0.0)
    return [
        Verdict(f"{canvas.run}: seam score", canvas.seam_score, f"<= {limit:.2f}", at_most(canvas.seam_score, limit)),
        Verdict(
            f"{canvas.run}: agreement with the guide, dB",
            canvas.consistency_psnr_db,
            f">= {AGREEMENT_LIMIT_DB:g}",
            at_least(canvas.consistency_psnr_db, AGREEMENT_LIMIT_DB),
        ),
    ]


def cells_of(baseline: Baseline, tissue_grey: float, min_tissue: float) -> NDArray[np.bool_]:
    """Return which cells show tissue both on the canvas and as a patch: bool (n,)."""

    def shown(pictures: NDArray[np.uint8]) -> NDArray[np.bool_]:
        light = pictures.astype(np.float32).mean(axis=1) < tissue_grey
        return light.mean(axis=(1, 2)) >= min_tissue

    return shown(baseline.canvas) & shown(baseline.patches)
