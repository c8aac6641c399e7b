"""Say how good pictures are: distances between two sets of crops, and what a canvas tells by itself.

    python -m engine.quality RUN SLIDES
    python -m engine.quality RUN SLIDES --patches 64          (and single patches of the same model and conditions)
    python -m engine.quality PICTURES SLIDES --encoder uni --crop_mpp 0.5 --count 2000
    python -m engine.quality RUN                               (detail, seams and agreement alone)
    python -m engine.quality MODEL PREPARED --protocol zoomldm --inception FILE

A and B are runs, pictures, slides, bags of features, or folders of them. Writes OUT/quality.json and OUT/quality.html.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but for some inputs (they are listed), 130 or 143 interrupted.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.arguments import parse
from engine.errors import EngineError
from engine.evaluation.compare import Comparison
from engine.evaluation.config import QualityConfig
from engine.evaluation.page import number, page_of
from engine.evaluation.protocols import evaluate
from engine.interruption import sigterm_as_exit
from engine.progress import Progress
from engine.report import finite
from engine.state import disk_error, write_atomically

PROG = "python -m engine.quality"


def with_names(argv: Sequence[str]) -> list[str]:
    """Name the words before the first flag: A, then B."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))[:2]
    return [*(f"--{name}={word}" for name, word in zip("ab", words, strict=False)), *argv[len(words) :]]


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


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(with_names(argv), QualityConfig, f"{PROG} A B", (__doc__ or "").splitlines()[0])
    progress = Progress()
    try:
        with sigterm_as_exit():
            found = evaluate(config, progress)
            write(found, Path(config.out))
    except ValueError as error:
        progress.say(f"engine.quality: {error}")
        return 2
    except EngineError as error:
        progress.say(f"engine.quality: {error}")
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:
        progress.say("Interrupted. Nothing was written; run the same command again.")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    sys.stdout.write(f"{summary(found)}\n{Path(config.out) / 'quality.html'} shows them beside crops.\n")
    return 3 if found.unusable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
