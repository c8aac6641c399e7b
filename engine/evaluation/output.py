"""What a comparison leaves: quality.json, quality.html and the figures for a terminal."""

import json
from pathlib import Path

from engine.core.files import disk_error, write_atomically
from engine.evaluation.compare import Comparison
from engine.evaluation.page import number, page_of
from engine.images.metrics import finite


def write(found: Comparison, folder: Path) -> None:
    """Write quality.json and quality.html. Raises CanvasError if the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, f"{folder} cannot be made", folder.parent) from error
    record = json.dumps(finite(found.record()), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomically(folder / "quality.json", (record + "\n").encode())
    write_atomically(folder / "quality.html", page_of(found).encode())


def summary(found: Comparison) -> str:
    """Return the figures for a terminal."""
    lines = [f"{r.what:<40} {number(r.value):>9}   n {r.n_a}, {r.n_b}; floor {number(r.floor)}" for r in found.table]
    for f in found.figures:
        span = "" if f.low is None else f" ({number(f.low)} … {number(f.high)})"
        beside = f"floor {number(f.floor)}, ceiling {number(f.ceiling)}, A at the floor's n {number(f.at_floor_n)}"
        lines.append(f"{f.name:<26} {number(f.value):>9}{span}   {beside}")
    for verdict in found.verdicts:
        word = {True: "met", False: "NOT MET", None: "cannot be said"}[verdict.met]
        lines.append(f"{verdict.name:<52} {number(verdict.value):>9} {verdict.limit:>8}  {word}")
    said = found.detail.get("flags", []) if found.detail else []
    lines += [f"detail, A relative to B: {flag}" for flag in said]
    if found.patches:
        lines += [f"detail, canvas relative to single patches: {flag}" for flag in found.patches["detail"]["flags"]]
    lines += [f"warning: {text}" for text in found.warnings]
    lines += [f"not used ({u.code}): {u.path}" for u in found.unusable]
    return "\n".join(lines)
