"""Write docs/results/reliability.md from what the fault suite recorded.

    make faults
    python -m benchmarks.reliability --record runs/faults.json --out docs/results/reliability.md

It counts and prints; it tries nothing. The text around the table is here, the figures are the record's.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.cli import parse

GROUPS = {
    "driver": "The driver",
    "replicas": "Replicas",
    "cluster": "Nodes, the head, Ray itself",
    "disk": "Disks",
    "damage": "Damaged, lost and old files",
}
"""Groups of the ledger in the order of the report."""
HEAD = """# Reliability

What happens to a run when things go wrong, tried on a tiny real model (520 × 256 px in two levels, a joint pass and a
refinement, all exports) through the command itself. After each fault the command is repeated, and what the run leaves
(the committed latents, the picture with its pyramid, every export) is compared byte by byte with an undisturbed run.
A fault counts as **lost** when the bytes differ, a run cannot be continued, or its message does not say what to do. All
runs record the writer of every chunk (`tests/support/chunk_writers.py`) and fail on a second one.

`make faults` tries everything and writes this page; a short part belongs to `make test`.
"""


@dataclass(frozen=True)
class ReliabilityConfig:
    """Where the record is, and where the page goes."""

    record: str = "runs/faults.json"
    """JSON written by pytest's --faults-record."""
    out: str = "docs/results/reliability.md"
    """The page."""


def page(record: dict[str, Any]) -> str:
    """Return the page, markdown."""
    trials = record["trials"]
    lost = sum(t["lost"] for t in trials)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        HEAD,
        f"**{len(trials)} faults tried, {lost} lost** ({record['date']}; {record['machine']}, {versions}).",
        "",
    ]
    missing = [g for g in GROUPS if not any(t["group"] == g for t in trials)]
    if record["left_out"] or record["skipped"] or missing:
        lines += [
            f"This is a part of the suite: {record['left_out']} of its tests were left out and {record['skipped']} "
            "cannot run on the machine. What is not listed was not tried; `make faults` tries it.",
            "",
        ]
    for group, title in GROUPS.items():
        own = [t for t in trials if t["group"] == group]
        lines += [f"## {title}", ""]
        if not own:
            lines += ["Not tried in this run.", ""]
            continue
        lines += ["| fault | tried | lost | what the run did |", "|---|---|---|---|"]
        for fault in dict.fromkeys(t["fault"] for t in own):
            same = [t for t in own if t["fault"] == fault]
            outcomes = "; ".join(dict.fromkeys(t["outcome"] for t in same if t["outcome"]))
            lines.append(f"| {fault} | {len(same)} | {sum(t['lost'] for t in same)} | {outcomes} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Read, write, say where."""
    config = parse(argv, ReliabilityConfig, "benchmarks.reliability", __doc__ or "")
    Path(config.out).write_text(page(json.loads(Path(config.record).read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"{config.out} is written from {config.record}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
