"""The largest resident set of this process; apart from the benchmarks, so that asking costs no import of a network."""

import resource
from pathlib import Path


def peak_mb() -> float:
    """Return this process's largest resident set so far, in MB (10⁶ bytes)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
