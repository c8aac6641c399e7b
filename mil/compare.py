"""Compare studies on the same patients: paired differences of AUROC with interval and p-value.

    python -m mil.compare runs/mil/both runs/mil/fine runs/mil/coarse --out comparison

Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from engine.core.cli import parse
from engine.core.exits import DONE, exit_code
from engine.core.files import write_atomically, write_json
from mil.report import plots
from mil.report.comparison import compare, comparison_plot, comparison_table, contenders, difference_plot

PROG = "python -m mil.compare"


@dataclass(frozen=True)
class CompareConfig:
    """Which runs are compared."""

    runs: tuple[str, ...]
    """Run folders of mil.train; may be given first, without --runs."""
    out: str = "comparison"
    """Where to write: OUT.json, OUT.txt, and the plots OUT.png and OUT_differences.png."""
    baseline: bool = True
    """Compare with the mean-pool baseline of the first run, too."""
    seed: int = 0
    """Seed of the bootstrap."""
    resamples: int = 2000
    """Bootstrap resamples of patients."""

    def __post_init__(self) -> None:
        if len(self.runs) + self.baseline < 2:
            raise ValueError(f"runs must be at least two, or one with its baseline; got {len(self.runs)}.")
        if self.resamples < 100:
            raise ValueError(f"resamples must be at least 100; got {self.resamples}.")


def write_comparison(config: CompareConfig) -> str:
    """Write table, figures and plots; return the table. Raises EngineError."""
    result = compare(contenders([Path(run) for run in config.runs], config.baseline), config.seed, config.resamples)
    out = Path(config.out)
    table = comparison_table(result)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_name(out.name + ".json"), result.as_json())
    write_atomically(out.with_name(out.name + ".txt"), table.encode())
    write_atomically(out.with_name(out.name + ".png"), plots.png(comparison_plot(result)))
    write_atomically(out.with_name(out.name + "_differences.png"), plots.png(difference_plot(result)))
    return table


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    runs = list(takewhile(lambda word: not word.startswith("-"), argv))
    if runs:
        argv = [f"--runs={json.dumps(runs)}", *argv[len(runs) :]]
    config = parse(argv, CompareConfig, f"{PROG} RUN RUN ...", (__doc__ or "").splitlines()[0])

    def work() -> int:
        sys.stdout.write(write_comparison(config))
        return DONE

    return exit_code("mil.compare", work, lambda: "Run the same command again.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
