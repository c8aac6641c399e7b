"""Command lines of the benchmarks: the same way for all of them, figures as JSON where they are asked for."""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def figures_parser(file: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the module in `file`, explained by its docstring, with --json."""
    module = ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m {module}", description=doc, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser


def write_json(path: Path | None, figures: object) -> None:
    """Write figures to the file that --json names; nothing without one."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")
