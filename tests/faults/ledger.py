"""What the fault suite tried and what was lost; written as JSON for `python -m benchmarks.reliability`."""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Trial:
    """One fault in one run."""

    group: str
    fault: str
    lost: bool = True
    """Until the run has ended as it should, with the same bytes."""
    seconds: float = 0.0
    outcome: str = ""
    """What the run did about it, in words."""


@dataclass
class Ledger:
    """All trials of a session."""

    trials: list[Trial] = field(default_factory=list)
    left_out: int = 0
    """Tests of the suite that were not asked for."""
    skipped: int = 0
    """Tests that this machine cannot run, such as those that mount a disk."""

    @contextmanager
    def trial(self, group: str, fault: str) -> Iterator[Trial]:
        """Count a fault as tried, and as lost unless the block ends well."""
        trial = Trial(group, fault)
        self.trials.append(trial)
        start = time.monotonic()
        try:
            yield trial
            trial.lost = False
        finally:
            trial.seconds = round(time.monotonic() - start, 1)

    def save(self, path: Path) -> None:
        """Write the record."""
        from importlib.metadata import version

        record = {
            "date": time.strftime("%Y-%m-%d"),
            "left_out": self.left_out,
            "skipped": self.skipped,
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "versions": {name: version(name) for name in ("torch", "ray", "zarr")},
            "trials": [asdict(trial) for trial in self.trials],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
