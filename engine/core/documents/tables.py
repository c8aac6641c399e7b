"""Tables as text editors, statistics programs and spreadsheets save them: cells as text, by column and line.

Encoding (UTF-8 or UTF-16, with a mark or without) and separator (comma, semicolon, tab, bar) are found, never guessed
from the ending; what is no text, or whose rows do not fit its header, is refused. It does not know what columns mean.
"""

import codecs
import csv
import io
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.core.errors import EngineError

INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060\u00ad"
"""Marks without width; at the ends of a cell they say nothing."""
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
_WORKBOOKS = {b"PK\x03\x04": "a workbook or archive", b"\xd0\xcf\x11\xe0": "an old workbook", b"\x1f\x8b": "compressed",
              b"%PDF": "a PDF", b"{\\rtf": "a text document"}  # fmt: skip
_SAVE = "Save it as text: in a spreadsheet, as CSV UTF-8"


@dataclass(frozen=True)
class Table:
    """The cells of a table."""

    path: Path
    names: tuple[str, ...]
    """Names of the columns."""
    rows: tuple[tuple[int, dict[str, str]], ...]
    """Number of the line a row ends in, and its cells; rows without a filled cell are none."""
    separator: str


def clean(text: str) -> str:
    """Return a text in one Unicode form (NFC), without blanks and invisible marks at its ends."""
    return unicodedata.normalize("NFC", text).strip().strip(INVISIBLE).strip()


def read_table(path: Path, wanted: Sequence[Collection[str]], what: str, fault: type[EngineError]) -> Table:
    """Read a table. `wanted` are sets of columns, of which one is looked for; whether it is there is not checked here.

    Raises: `fault`, beginning with `what`, for no text, or a row or header that cannot be understood.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise fault(
            f"{what} must be a table (.csv or .tsv); {path} cannot be read: {error}. Check the path."
        ) from error
    text = _decoded(data, path, what, fault)
    separator = _separator(text, wanted)
    body = io.StringIO(text, newline="")
    reader = csv.reader(body, delimiter=separator, strict=True)
    names: tuple[str, ...] = ()
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        for cells in reader:
            cells = [clean(cell) for cell in cells]
            if not any(cells) or (not names and "".join(cells).lower() in ("sep=", f"sep={separator}")):
                continue
            if names:
                _check_row(cells, names, f"{path}, line {reader.line_num}", fault)
                cells += [""] * (len(names) - len(cells))  # Excel leaves empty cells at the end of a row out
                row = dict(zip(names, cells, strict=False))
                _check_cells(row, wanted, f"{path}, line {reader.line_num}", fault)
                rows.append((reader.line_num, row))
            else:
                names = tuple(cells)
                _check_header(names, wanted, path, fault)
    except csv.Error as error:
        raise fault(
            f"{what} must be a table whose quotes are closed; {path}, line {reader.line_num}: {error}. Correct it."
        ) from error
    return Table(path, names, tuple(rows), separator)


def _decoded(data: bytes, path: Path, what: str, fault: type[EngineError]) -> str:
    kind = next((name for start, name in _WORKBOOKS.items() if data.startswith(start)), None)
    if kind is not None:
        raise fault(f"{what} must be a table as text (.csv or .tsv); {path} is {kind}. {_SAVE}.")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None:
        even, odd = data[:4096:2].count(0), data[1:4096:2].count(0)
        # The first letters of a header are Latin, so UTF-16 without a mark has zeros on one side of each.
        encoding = "utf-8" if max(even, odd) < len(data[:4096]) / 4 else "utf-16-le" if odd > even else "utf-16-be"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise fault(
            f"{what} must be a table in UTF-8 or UTF-16; {path} cannot be read as {encoding.upper()}: line {line} has "
            f"the byte 0x{data[error.start]:02X}, as tables in a Windows or Mac code page do. {_SAVE}."
        ) from error
    if "\0" in text:
        raise fault(f"{what} must be a table as text (.csv or .tsv); {path} holds zero bytes. {_SAVE}.")
    return text


def _separator(text: str, wanted: Sequence[Collection[str]]) -> str:
    """Return the separator by which the header has the wanted columns, else the one that makes most columns."""
    lines = [line for line in text.lstrip("\ufeff").splitlines() if line.strip(' "' + "".join(SEPARATORS))]
    first = lines[0].strip() if lines else ""
    if first.lower().startswith("sep=") and first[4:5] in SEPARATORS:
        return first[4]
    headers = {
        separator: [clean(c) for c in next(csv.reader([first], delimiter=separator))] for separator in SEPARATORS
    }

    def fits(separator: str) -> tuple[int, int]:
        found = headers[separator]
        return max(sum(name in found for name in names) for names in wanted), len(found)

    return max(SEPARATORS, key=fits)


def _check_row(cells: list[str], names: Sequence[str], where: str, fault: type[EngineError]) -> None:
    if any(cells[len(names) :]):
        raise fault(
            f"{where}: a row must have no more cells than the header has columns, {len(names)}; got {len(cells)}: "
            f"{' | '.join(cells[:8])}. Put text or numbers with a comma in quotes, or separate cells by semicolons."
        )


def _check_header(
    names: Sequence[str], wanted: Sequence[Collection[str]], path: Path, fault: type[EngineError]
) -> None:
    if twice := {name for names_ in wanted for name in names_ if names.count(name) > 1}:
        raise fault(f"{path} must have each column once; {', '.join(sorted(twice))} comes twice. Rename one of them.")


def _check_cells(
    row: Mapping[str, str], wanted: Sequence[Collection[str]], where: str, fault: type[EngineError]
) -> None:
    used = (row[name] for names in wanted for name in names if name in row)
    if bad := next((cell for cell in used if "\n" in cell or "\r" in cell), None):
        raise fault(f"{where}: a cell must be one line of text; got {bad[:80]!r}. Correct it; a quote may be missing.")
