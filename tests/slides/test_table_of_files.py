"""docs/reference/slides.md promises what tests hold: each row names one that is there."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_names_a_test() -> None:
    page = (ROOT / "docs" / "reference" / "slides.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("| test |")]
    files = (ROOT / "tests").rglob("test_*.py")
    there = {
        node.name for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)
    }
    named = [name.strip() for row in rows for name in row.rstrip("| ").rpartition("|")[2].split(",")]
    assert len(named) >= len(rows) > 20
    assert [name for name in named if not name.startswith("test_") or name not in there] == []
