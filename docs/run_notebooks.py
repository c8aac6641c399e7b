"""Run the notebooks of docs/tutorial in an empty folder, and store them with outputs small enough for a repository.

python -m docs.run_notebooks
"""

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import PIL.Image
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs/tutorial").glob("*.ipynb"))
LONGEST_PX = 512
"""Edge of a picture that is stored."""
CELL_S = 600
"""A cell that takes longer hangs."""


def executed(path: Path, folder: Path) -> NotebookNode:
    """Return a notebook with the outputs of its cells, run in `folder`. Raises: CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    # The kernel takes the packages of this checkout, whatever is installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    client = NotebookClient(notebook, timeout=CELL_S, kernel_name="python3", record_timing=False, coalesce_streams=True)
    client.resources = {"metadata": {"path": str(folder)}}
    return client.execute(env=environment)


def with_small_outputs(notebook: NotebookNode) -> NotebookNode:
    """Return a notebook without progress bars, counts and large pictures."""
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [_small(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def _small(output: NotebookNode) -> NotebookNode:
    if "execution_count" in output:
        output.execution_count = None
    data = output.get("data", {})
    if "image/png" in data:
        data["image/jpeg"] = _as_jpeg(data.pop("image/png"))
    if "text/html" in data:
        inline = re.compile('data:image/png;base64,([^"]+)')
        data["text/html"] = inline.sub(lambda found: f"data:image/jpeg;base64,{_as_jpeg(found[1])}", data["text/html"])
    return output


def _as_jpeg(png: str) -> str:
    """Return a base64 PNG as a base64 JPEG of at most LONGEST_PX."""
    with PIL.Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        small = picture.convert("RGB")
    small.thumbnail((LONGEST_PX, LONGEST_PX))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()


def main() -> int:
    """Run all notebooks and store them; return the exit code."""
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(with_small_outputs(executed(path, Path(folder))), path)
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
