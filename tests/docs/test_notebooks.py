"""The tutorials' notebooks run from top to bottom on the demo model, and are small in the repository."""

from pathlib import Path

import nbformat
import pytest

from docs.run_notebooks import NOTEBOOKS, executed, with_small_outputs

STORED_BYTES = 200_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    done = with_small_outputs(executed(path, tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"], "a notebook writes into runs/ alone"
    stored = nbformat.read(path, as_version=4)
    assert [len(cell.get("outputs", ())) for cell in stored.cells] == [
        len(cell.get("outputs", ())) for cell in done.cells
    ], "run python -m docs.run_notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_small_and_shows_no_error(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < STORED_BYTES
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/jpeg" in output.get("data", {}) for output in outputs), "run python -m docs.run_notebooks"
