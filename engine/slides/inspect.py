"""What --dry-run shows: one row per slide, before any model is loaded; the same as CSV.

Every slide is opened, its tissue found and its tiles counted. One bad slide is one row with a reason code; it never
stops the others. It knows no features and no models.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from engine.core.errors import EngineError
from engine.core.files import write_atomically
from engine.slides.backends.choice import ONLY, Choice
from engine.slides.boundary import one_slide
from engine.slides.resolution import Overrides, Resolution
from engine.slides.slide import open_slide, slide_name
from engine.slides.tile_grid import GridConfig, check_fine_enough, plan_grid
from engine.slides.tissue import TissueConfig, check_seen, find_tissue

NOTES = frozenset({"no_tissue", "damaged_parts", "one_of_several", "estimated_mpp"})
"""Problems to know of with which a slide is processed all the same."""


@dataclass(frozen=True)
class SlideRow:
    """What is known of a slide; None where it could not be found out."""

    slide: str
    path: str
    reader: str | None = None
    picture: str = ""
    """Which of several pictures of the file is read, and what is left out."""
    width: int | None = None
    """Level-0 px."""
    height: int | None = None
    levels: str | None = None
    """Level-0 px per px of each level."""
    mpp_x: float | None = None
    mpp_y: float | None = None
    mpp_source: str | None = None
    objective: float | None = None
    tissue_share: float | None = None
    unseen_share: float | None = None
    """Of the slide: damaged at every level, so that nobody can tell whether there is tissue."""
    tiles_20x: int | None = None
    tiles_5x: int | None = None
    problem: str = ""
    """Reason code; empty if there is none."""
    message: str = ""

    @property
    def usable(self) -> bool:
        """Whether the slide can be processed."""
        return not self.problem or self.problem in NOTES


def inspect_slide(
    path: Path,
    tissue: TissueConfig,
    grid: GridConfig,
    overrides: Overrides | None = None,
    mpp: float | None = None,
    series: int | None = None,
    most_damage: float = 0.25,
) -> SlideRow:
    """Open a slide, find its tissue and count its tiles; whatever it raises becomes the row's problem.

    A slide of which a larger share than `most_damage` cannot be looked at for tissue is `damaged`.
    """
    row = SlideRow(slide_name(path), str(path))
    try:
        with one_slide(row.slide, path, "opened and planned"), open_slide(path, overrides, mpp, series) as slide:
            resolution = slide.resolution
            row = replace(
                row,
                reader=slide.reader,
                picture=slide.choice.told,
                width=slide.width,
                height=slide.height,
                levels=" ".join(f"{(sy + sx) / 2:.5g}" for sy, sx in slide.scales),
                mpp_x=resolution.mpp_x,
                mpp_y=resolution.mpp_y,
                mpp_source=resolution.source,
                objective=slide.objective,
            )
            check_fine_enough(slide, grid.mpp)  # its overview may be larger than any memory
            mask = find_tissue(slide, tissue)
            row = replace(row, tissue_share=mask.total_share, unseen_share=mask.lost)
            check_seen(slide, mask.lost, most_damage)
            tiles = plan_grid(slide, mask, grid)
            row = replace(row, tiles_20x=len(tiles), tiles_5x=len(tiles.parent_coords))
    except EngineError as error:
        return replace(row, problem=getattr(error, "code", "failed"), message=str(error))
    code, message = note_on(slide.name, len(tiles), resolution, slide.choice, mask.lost)
    return replace(row, problem=code, message=message)


def note_on(
    slide: str, tiles: int, resolution: Resolution, choice: Choice = ONLY, unseen: float = 0.0, masked: int = 0
) -> tuple[str, str]:
    """Return what to know of a slide that is processed all the same: the first of NOTES and all messages, or nothing.

    `unseen` is the share of the slide that damage hid from the search for tissue, `masked` the tiles it hid.
    """
    said: dict[str, str] = {}
    if not tiles:
        said["no_tissue"] = (
            "no tile has enough tissue, so its bag is empty. If it is no H&E, --finder.method everything keeps all of "
            "it; --tissue DIR takes what you draw."
        )
    if unseen or masked:
        said["damaged_parts"] = (
            f"blocks of the file cannot be decoded: {masked} of {tiles} tiles are masked, and {unseen:.2%} of the "
            "slide could not be looked at for tissue. Copy it again if the source is whole."
        )
    if choice.doubtful:
        said["one_of_several"] = (
            f"the file holds several pictures; px and µm/px are those of {choice.told}. Choose another one with "
            "--series NUMBER."
        )
    if resolution.estimated:
        said["estimated_mpp"] = (
            "µm/px is estimated from the objective; give it in the overrides table (--overrides) if you know it."
        )
    return next(iter(said), ""), f"{slide}: {' '.join(said.values())}" if said else ""


def inspect_slides(
    paths: Sequence[Path],
    tissue: TissueConfig,
    grid: GridConfig,
    overrides: Overrides | None = None,
    mpp: float | None = None,
    series: int | None = None,
    most_damage: float = 0.25,
) -> Iterator[SlideRow]:
    """Yield a row per slide. Slides of one name are not opened: their results would overwrite each other."""
    names = Counter(slide_name(path) for path in paths)
    for path in paths:
        name = slide_name(path)
        if names[name] == 1:
            yield inspect_slide(path, tissue, grid, overrides, mpp, series, most_damage)
            continue
        others = ", ".join(str(p) for p in paths if slide_name(p) == name and p != path)
        message = f"{name}: names of slides must differ, they name the results; {others} is called so too. Rename one."
        yield SlideRow(name, str(path), problem="duplicate_name", message=message)


def write_csv(path: Path, rows: Iterable[SlideRow]) -> None:
    """Write all columns. Raises CanvasError if the disk refuses; the old file then still stands."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(SlideRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue().encode())


def format_table(rows: Sequence[SlideRow]) -> str:
    """Return the rows as aligned columns, then what is wrong with which, one line each."""
    header = ("slide", "size px", "levels", "µm/px", "from", "objective", "tissue", "20x", "5x", "problem")
    lines = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*table, *(f"{row.problem}: {row.message}" for row in rows if row.problem)])


def _cells(row: SlideRow) -> tuple[str, ...]:
    def shown(value: float | str | None, form: str = "") -> str:
        return "-" if value is None else format(value, form)

    size = "-" if row.width is None else f"{row.width}x{row.height}"
    mpp = shown(row.mpp_x, ".4g") if row.mpp_x == row.mpp_y else f"{row.mpp_x:.4g} x {row.mpp_y:.4g}"
    counts = shown(row.tiles_20x, "d"), shown(row.tiles_5x, "d")
    source, objective = shown(row.mpp_source), shown(row.objective, "g")
    return (
        row.slide,
        size,
        shown(row.levels),
        mpp,
        source,
        objective,
        shown(row.tissue_share, ".1%"),
        *counts,
        row.problem,
    )
