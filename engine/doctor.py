"""Say what this machine and this installation offer, what the engine will choose on them and why.

    python -m engine.doctor
    python -m engine.doctor --json
    python -m engine.doctor --wait_s 0        (asks nobody: neither the Hub nor a cluster)

Exit codes: 0 nothing that the engine needs is broken, 1 something is, with the remedy, 2 wrong usage.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from engine._backends.cluster import find_cluster
from engine.core.cli import parse_with_flags
from engine.core.exits import DONE, FAILED, exit_code
from engine.installation import machine, reach
from engine.installation.findings import BROKEN, as_json, as_text

PROG = "python -m engine.doctor"
FLAGS = {"json": "print JSON instead of text"}


@dataclass(frozen=True)
class DoctorConfig:
    """How long others are waited for."""

    wait_s: float = 5.0
    """Longest wait for the Hub and for a cluster, s; 0 asks nobody."""

    def __post_init__(self) -> None:
        if self.wait_s < 0:
            raise ValueError(f"wait_s must be at least 0; got {self.wait_s}.")


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    config, flags = parse_with_flags(argv, DoctorConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)

    def work() -> int:
        findings = [
            *(*machine.python(), *machine.packages(), *machine.arithmetic(), *machine.readers()),
            *(*reach.ray(find_cluster, config.wait_s), *machine.disks(), *reach.hub(config.wait_s)),
            *reach.environment(),
        ]
        sys.stdout.write((as_json if "json" in flags else as_text)(findings) + "\n")
        return FAILED if any(found.state == BROKEN for found in findings) else DONE

    return exit_code("engine.doctor", work, lambda: "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
