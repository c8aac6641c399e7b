"""Rows out of a folder of slides: so many regions of each, on its tissue, drawn from a seed.

Invariant: which regions a slide gives depends on the slide, the size, the seed and the share of tissue alone, not on
the other slides. A slide that cannot be used is a failure of its own pictures and stops no other.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.cohort.config import CohortConfig
from engine.cohort.table import Asked, BadRow, Row, check_labels, check_name, seed_of, without_doubles
from engine.core.documents.tables import read_table
from engine.core.errors import EngineError, RowError, SlideError
from engine.core.streaming import Box
from engine.core.units import TILE_PX
from engine.slides.boundary import one_slide
from engine.slides.slide import Slide, find_slides, open_slide, slide_name
from engine.slides.tissue import find_tissue


def rows_of_recipe(config: CohortConfig, base_mpp: float) -> list[Asked]:
    """Return the rows, by slide. Raises: EngineError if there are no slides, or the table of labels is none."""
    assert config.slides is not None  # the caller chose
    labels = None if config.recipe.labels is None else read_labels(Path(config.recipe.labels))
    paths = find_slides(Path(config.slides).absolute())
    count = Counter(slide_name(path) for path in paths)
    asked: list[Asked] = []
    for path in paths:
        if count[slide_name(path)] > 1:
            others = ", ".join(str(p) for p in paths if slide_name(p) == slide_name(path) and p != path)
            text = f"{slide_name(path)}: slides must have different names; {others} is called so too. Rename one."
            asked += [BadRow(row.name, "duplicate_name", text, row) for row in _blank_rows(path, config)]
        else:
            asked += _rows_of_slide(path, config, base_mpp, labels)
    return without_doubles(asked)


def read_labels(path: Path) -> dict[str, dict[str, str]]:
    """Return the cells of each slide's row. Raises: EngineError."""
    table = read_table(path, [("slide", "patient")], "--recipe.labels", EngineError)
    if not {"slide", "patient"} <= set(table.names):
        came = ", ".join(filter(None, table.names))
        raise EngineError(f"{path} must have the columns slide and patient; it has {came or 'none'}.")
    found = {slide_name(Path(cells["slide"])): cells for _, cells in table.rows if cells["slide"]}
    if len(found) < sum(bool(cells["slide"]) for _, cells in table.rows):
        raise EngineError(f"{path} must name each slide once; some come twice. Remove the copies.")
    return found


def _blank_rows(path: Path, config: CohortConfig) -> Iterator[Row]:
    """Yield the rows of a slide without regions."""
    name = slide_name(path)
    for number in range(config.recipe.variations):
        own = f"{name}_v{number:03d}"
        yield Row(own, seed_of(f"{config.recipe.seed}/{own}"), reference=str(path), source_slide=name)


def _rows_of_slide(
    path: Path, config: CohortConfig, base_mpp: float, labels: Mapping[str, Mapping[str, str]] | None
) -> list[Asked]:
    rows, name = list(_blank_rows(path, config)), slide_name(path)
    try:
        rows = [_labelled(row, labels, config.label) for row in rows]
        check_name(rows[0].name, str(path))
        if config.bags_only:  # a bag takes its tiles from all of the slide
            return list(rows)
        with one_slide(name, path, "opened and searched for tissue"), open_slide(path, mpp=config.mpp) as slide:
            boxes = _regions(slide, config, base_mpp)
    except (RowError, SlideError) as error:
        return [BadRow(row.name, error.code, str(error), row) for row in rows]
    return [replace(row, region=box, height=config.canvas.height, width=config.canvas.width)
            for row, box in zip(rows, boxes, strict=True)]  # fmt: skip


def _labelled(row: Row, labels: Mapping[str, Mapping[str, str]] | None, column: str) -> Row:
    """Add what the table says of the slide; `column` has its label, if it is there.

    Raises: RowError `missing_label` or `missing_patient`.
    """
    if labels is None:
        return row
    cells = labels.get(row.source_slide)
    if cells is None:
        raise RowError("missing_label", f"{row.source_slide}: --recipe.labels must have a row for every slide; it has "
                       "none for this one. Add it, or take the slide out of the folder.")  # fmt: skip
    known = ("slide", "patient", "source_patient", "source_slide", column)
    more = tuple((k, v) for k, v in cells.items() if k and k not in known)
    row = replace(row, label=cells.get(column, ""), source_patient=cells["patient"], more=more)
    if not row.source_patient:
        raise RowError("missing_patient", f"{row.source_slide}: its row of --recipe.labels names no patient. Fill it.")
    check_labels(row, any(c.get(column) for c in labels.values()), "--recipe.labels")
    return row


def _regions(slide: Slide, config: CohortConfig, base_mpp: float) -> list[Box]:
    """Return a region per variation, in level-0 px: different places while there are, then the same ones again.

    Raises: SlideError `too_small` or `no_tissue`.
    """
    wide, tall = slide.field(config.canvas.width, base_mpp)[0], slide.field(config.canvas.height, base_mpp)[1]
    if wide > slide.width + 0.5 or tall > slide.height + 0.5:
        raise SlideError(
            "too_small",
            f"{slide.name}: a region of {config.canvas.width}x{config.canvas.height} px at {base_mpp:g} µm/px must fit "
            f"into the slide; it has {slide.width}x{slide.height} px of {slide.resolution.mpp:.4g} µm/px. Lower "
            "canvas.width and canvas.height.",
        )
    step = slide.field(TILE_PX, base_mpp)
    xs = np.arange(0, slide.width - wide + 0.5, step[0])
    ys = np.arange(0, slide.height - tall + 0.5, step[1])
    share = find_tissue(slide, config.finder).share(xs[None, :], ys[:, None], wide, tall)
    rows, columns = np.nonzero(share >= config.recipe.min_tissue)
    if not len(rows):
        raise SlideError(
            "no_tissue",
            f"{slide.name}: a region must be {config.recipe.min_tissue:.0%} tissue; the best is {share.max():.0%}."
            " Lower recipe.min_tissue or the canvas, or leave the slide out.",
        )
    order = np.random.default_rng([config.recipe.seed, seed_of(slide.name)]).permutation(len(rows))
    chosen = [order[i % len(order)] for i in range(config.recipe.variations)]
    # Whole px inside the slide; the picture is read at the fraction of one that is lost.
    size = max(1, int(tall + 1e-6)), max(1, int(wide + 1e-6))
    corners = [(int(ys[rows[i]]), int(xs[columns[i]])) for i in chosen]
    return [Box(y, x, y + size[0], x + size[1]) for y, x in corners]
