"""The table of a cohort: one row per picture, checked against itself before a model is loaded.

Invariant: a row that is returned has a name of its own, one source of conditions and numbers that a run takes; every
other one is a failure with its reason, and stops no other. It does not open slides.
"""

import difflib
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.cohort.config import CohortConfig
from engine.core.documents import tables
from engine.core.errors import BagError, EngineError, RowError
from engine.core.streaming import Box
from engine.core.units import TILE_PX
from engine.slides.slide import SLIDE_SUFFIXES, check_slide_name, slide_name

CONDITIONS = ("reference", "embeddings", "text")
"""Columns of which a row fills one, or none: then the CDM draws its conditions."""
KNOWN = (
    *("name", *CONDITIONS, "condition", "region", "seed", "height", "width"),
    *("label", "patient", "source_patient", "source_slide"),
)
_MOST_SEED = 2**63


@dataclass(frozen=True)
class Row:
    """One picture, or bag, that is asked for."""

    name: str
    """Names its folder and file."""
    seed: int
    height: int | None = None
    """px at the base magnification; None: of the region, else of the configuration."""
    width: int | None = None
    reference: str | None = None
    """Path of a slide or picture."""
    region: Box | None = None
    """Of the reference, in its own px (level 0)."""
    embeddings: str | None = None
    text: str | None = None
    label: str = ""
    patient: str = ""
    source_patient: str = ""
    source_slide: str = ""
    more: tuple[tuple[str, str], ...] = ()
    """Further columns, copied into labels.csv."""

    @property
    def digest(self) -> str:
        """The sha256 of what decides its files; labels may change."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("label", "patient", "more")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    @property
    def origin(self) -> dict[str, str]:
        """What its files say of where they come from."""
        said = {"source_patient": self.source_patient, "source_slide": self.source_slide}
        return {key: value for key, value in said.items() if value}

    @property
    def drawn_by(self) -> str | None:
        """What network of the model's draws its conditions: "cdm", "text_prior", or none."""
        if self.reference is not None or self.embeddings is not None:
            return None
        return "cdm" if self.text is None else "text_prior"

    @property
    def owner(self) -> str:
        """The patient in tables of labels: its own, else the one it inherits."""
        return self.patient or self.source_patient


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be made, and why."""

    name: str
    code: str
    message: str
    row: Row | None = None
    """What could be read of it."""


Asked = Row | BadRow


def read_table(config: CohortConfig) -> list[Asked]:
    """Read the table, in its order. Raises: EngineError if it is no table of pictures."""
    assert config.table is not None  # the caller chose
    path = Path(config.table)
    table = tables.read_table(path, [KNOWN], "--table", EngineError)
    _check_columns(path, table.names)
    if not table.rows:
        raise EngineError(f"--table must have one row per picture; {path} has a header alone.")
    labelled = any(cells.get("label") for _, cells in table.rows)
    asked = [_checked(path, line, cells, config, labelled) for line, cells in table.rows]
    return without_doubles(asked)


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a table without names, and a column that is nearly a known one."""
    if "name" not in names:
        raise EngineError(
            f"--table must have the column name; {path} has {', '.join(filter(None, names)) or 'none'}. Known columns: "
            f"{', '.join(KNOWN)}; others are copied into labels.csv."
        )
    for name in names:
        near = difflib.get_close_matches(name.casefold(), KNOWN, 1, 0.8)
        if name and name not in KNOWN and near and near[0] not in names:
            raise EngineError(f"{path}: the column {name} is not known; did you mean {near[0]}? Rename it.")


def _checked(path: Path, line: int, cells: Mapping[str, str], config: CohortConfig, labelled: bool) -> Asked:
    """Return a row, or why it cannot be one."""
    name, where = cells.get("name", ""), f"{path}, line {line}"
    row = Row(
        name,
        seed=0,
        label=cells.get("label", ""),
        patient=cells.get("patient", ""),
        source_patient=cells.get("source_patient", ""),
        source_slide=cells.get("source_slide", ""),
        more=tuple((k, v) for k, v in cells.items() if k and k not in KNOWN),
    )
    try:
        check_name(name, where)
        row = replace(row, seed=_seed(cells.get("seed", ""), name, config.sampling.seed, where))
        row = replace(row, **_condition(cells, config, where))
        sizes = {k: _size(cells[k], k, where) for k in ("height", "width") if cells.get(k)}
        row = replace(row, **sizes, region=_region(cells.get("region", ""), where))
        if row.region is not None and row.reference is None:
            raise RowError("bad_region", f"{where}: a region is of a reference; there is none. Name the slide.")
        check_labels(row, labelled, where)
    except RowError as error:
        return BadRow(name or f"line {line}", error.code, str(error), row)
    return row


def check_name(name: str, where: str) -> None:
    """Refuse what cannot name a folder. Raises RowError `missing_name` or `bad_name`."""
    if not name:
        raise RowError("missing_name", f"{where}: every row needs a name; this one has none. Fill it.")
    try:
        check_slide_name(name)
    except BagError as error:
        raise RowError("bad_name", f"{where}: {error}") from error


def check_labels(row: Row, labelled: bool, where: str) -> None:
    """Refuse a row without a label where others have one, and a label of nobody. Raises RowError."""
    if labelled and not row.label:
        raise RowError("missing_label", f"{where}: other rows have a label; {row.name} has none. Fill it.")
    if row.label and not row.owner:
        raise RowError(
            "missing_patient",
            f"{where}: a label needs a patient, or the source_patient it is inherited from; {row.name} has none, and "
            "nobody could keep it out of the test side. Fill one.",
        )


def _condition(cells: Mapping[str, str], config: CohortConfig, where: str) -> dict[str, str]:
    """Return the one source of conditions that a row fills; nothing: the CDM. Raises RowError."""
    given = {name: cells[name] for name in CONDITIONS if cells.get(name)}
    said = cells.get("condition", "").lower()
    if said not in ("", "cdm", "none", *CONDITIONS):
        raise RowError("bad_condition", f"{where}: condition must be cdm or empty; got {said!r}. The other columns say "
                       "what a row is conditioned on.")  # fmt: skip
    if len(given) > 1 or (given and said in ("cdm", "none")) or (said in CONDITIONS and said not in given):
        came = " and ".join([*given, *([f"condition={said}"] if said else [])])
        raise RowError(
            "two_conditions", f"{where}: a row takes one of {', '.join(CONDITIONS)} or cdm; got {came}. Keep one."
        )
    if "reference" in given:
        given["reference"] = _found(given["reference"], config, where)
    if "embeddings" in given and not Path(given["embeddings"].rpartition(":")[0] or given["embeddings"]).exists():
        raise RowError("no_embeddings", f"{where}: there must be embeddings at {given['embeddings']}; there are none. "
                       "Check the path.")  # fmt: skip
    return given


def _found(reference: str, config: CohortConfig, where: str) -> str:
    """Return the path of a reference: as it is, in the folder of slides, or there under its name without its ending.

    Raises: RowError `unknown_slide`.
    """
    folder = None if config.slides is None else Path(config.slides)
    places = [Path(reference), *([] if folder is None else [folder / reference])]
    for place in places:
        if place.exists():
            return str(place)
    if folder is not None and folder.is_dir():
        same = [
            p for p in sorted(folder.iterdir()) if p.suffix.lower() in SLIDE_SUFFIXES and slide_name(p) == reference
        ]
        if len(same) == 1:
            return str(same[0])
    looked = "" if folder is None else f", nor in {folder}"
    raise RowError(
        "unknown_slide", f"{where}: there must be a slide or picture {reference}; there is none here{looked}. Check "
        "the name, or pass --slides FOLDER."
    )  # fmt: skip


def _seed(text: str, name: str, job: int, where: str) -> int:
    """Return a row's seed: its own, else one of the job's and the name, so that rows of one reference differ."""
    if not text:
        return seed_of(f"{job}/{name}")
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < _MOST_SEED:
        raise RowError("bad_seed", f"{where}: a seed must be a whole number in 0..2**63-1; got {text!r}. Correct it.")
    return seed


def seed_of(text: str) -> int:
    """Return a seed that a text decides, 0..2**31-1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _size(text: str, what: str, where: str) -> int:
    try:
        size = int(text)
    except ValueError:
        size = 0
    if size < TILE_PX:
        raise RowError(
            "bad_size", f"{where}: {what} must be a whole number of px, at least {TILE_PX}; got {text!r}. Correct it."
        )
    return size


def _region(text: str, where: str) -> Box | None:
    if not text:
        return None
    try:
        box = Box.parse(text)
    except ValueError as error:
        raise RowError("bad_region", f"{where}: {error} Write it in quotes.") from error
    if box.y0 < 0 or box.x0 < 0 or min(box.size) < 1:
        raise RowError("region_outside", f"{where}: a region must lie in its slide; got {text}. Correct it.")
    return box


def output_name(name: str) -> str:
    """Return what names share whose files some disk or table takes for one: but for case, form of letters, endings."""
    return unicodedata.normalize("NFKC", slide_name(Path(name))).casefold().strip()


def without_doubles(asked: Sequence[Asked]) -> list[Asked]:
    """Return the rows; those that share a name, or whose names some disk takes for one, are failures, all of them."""
    exact = Counter(row.name for row in asked)
    loose: dict[str, list[str]] = {}
    for name in exact:
        loose.setdefault(output_name(name), []).append(name)
    found: list[Asked] = []
    for row in asked:
        others = [name for name in loose[output_name(row.name)] if name != row.name]
        if isinstance(row, Row) and exact[row.name] > 1:
            text = f"{row.name}: names must differ, they name the files; {exact[row.name]} rows have this one. Rename."
            found.append(BadRow(row.name, "duplicate_name", text, row))
        elif isinstance(row, Row) and others:
            text = f"{row.name}: its file would replace that of {', '.join(others)} on some disks. Rename one."
            found.append(BadRow(row.name, "same_output_name", text, row))
        else:
            found.append(row)
    return found
