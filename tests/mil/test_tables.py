"""Tables are read in every form that spreadsheets save, and what does not fit is named by its line."""

import codecs
from pathlib import Path

import pytest

from engine.core.documents.tables import read_table
from mil.data.cohort import read_labels
from mil.data.tasks import Task, load_task
from mil.errors import CohortError

ROWS = [("patient", "slide", "hrd_score"), ("p1", "s\u00e91", "60.5"), ("p2", "s2", "10")]
SCORES = {"p1": 1, "p2": 0}


def text(separator: str = ",", end: str = "\n", comma: bool = False) -> str:
    rows = [[cell.replace(".", ",") if comma else cell for cell in row] for row in ROWS]
    return end.join(separator.join(row) for row in rows) + end


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "t.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(scope="module")
def hrd() -> Task:
    return load_task("hrd")


FORMS = {
    "plain": text(),
    "mark": text().encode("utf-8-sig"),
    "semicolon, decimal comma": text(";", "\r\n", comma=True).encode("utf-8-sig"),
    "tab, decimal comma": text("\t", comma=True),
    "bar": text("|"),
    "UTF-16": text("\t", "\r\n").encode("utf-16"),
    "UTF-16 without a mark": text().encode("utf-16-le"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + text().encode("utf-16-be"),
    "UTF-32": text().encode("utf-32"),
    "old Mac": text(end="\r"),
    "sep=": "sep=;\n" + text(";"),
    "empty lines and cells": "\n,,,\n" + text().replace("\n", ",\n") + ",,\n",
    "quotes": '"' + text('","', '"\n"').removesuffix('"'),
    "quoted decimal comma": text().replace("60.5", '"60,5"'),
    "a last cell less": text() + "p3,s3\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, hrd: Task, form: str) -> None:
    cohort = read_labels(written(tmp_path, FORMS[form]), hrd)
    assert cohort.labels == SCORES
    assert [s.name for s in cohort.slides] == ["s2", "s\u00e91"]
    assert [name for name, _ in cohort.left_out] == (["s3"] if "less" in form else [])


FAULTS = {
    "decimal comma without quotes": (text(comma=True), "line 2: a row must have no more cells.*p1 | s.*60 | 5"),
    "code page": (text().encode("cp1252"), "line 2 has the byte 0xE9.*CSV UTF-8"),
    "workbook": (b"PK\x03\x04rest", "workbook"),
    "old workbook": (b"\xd0\xcf\x11\xe0rest", "workbook"),
    "zero bytes": (text().replace("s2", "s\0\0"), "holds zero bytes"),
    "open quote": (text().replace("p2", '"p2'), "quotes are closed.*line 3"),
    "open quote that closes later": (text() + '"p3,s3,1\n"p4,s4,2\n', "quotes are closed.*line 5"),
    "two lines in a cell": (text().replace("p2", '"p\n2"'), r"line 4: a cell must be one line.*'p\\n2'"),
    "column twice": (text().replace("patient", "patient,slide", 1), "slide comes twice"),
    "either": (text().replace("10", '"1,234"').replace("60.5", "60"), "line 3 has '1,234', which may be 1234 or 1.234"),
    "both": (text().replace("10", '"6,5"') + "p3,s3,1.234\n", "line 4 has '1.234', which may be 1.234 or 1234"),
    "another case": (text().replace("patient", "PATIENT"), "did you mean PATIENT"),
    "nothing": ("", "has none"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, hrd: Task, fault: str) -> None:
    content, told = FAULTS[fault]
    with pytest.raises(CohortError, match=told):
        read_labels(written(tmp_path, content), hrd)


def test_a_point_between_thousands(tmp_path: Path) -> None:
    path = written(tmp_path, text(";").replace("10", "1.234").replace("60.5", "60,5"))
    assert read_labels(path, Task("t", "hrd_score > 1000")).labels == {"p1": 0, "p2": 1}


def test_cells(tmp_path: Path) -> None:
    path = written(tmp_path, 'a;b;free\n 1 ;x;"two\nlines"\n2\n')
    table = read_table(path, [["a", "b"], ["c"]], "--table", CohortError)
    assert table.names == ("a", "b", "free")
    assert [line for line, _ in table.rows] == [3, 4]
    assert table.rows[0][1] == {"a": "1", "b": "x", "free": "two\nlines"}
    assert table.rows[1][1] == {"a": "2", "b": "", "free": ""}
