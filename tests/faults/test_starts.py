"""Private Rays that start at the same moment on a machine that is busy already: each comes up, and leaves nothing."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.faults.ledger import Ledger

ROOT = Path(__file__).parents[2]
SCRIPT = """
import psutil
from actors.cluster import connect
from engine.core.config import RayConfig

with connect(RayConfig(address="local"), num_cpus=1, store_bytes=100_000_000):
    print([p.pid for p in psutil.Process().children(recursive=True)], flush=True)
"""
BUSY = "while True: pass"


@pytest.mark.ray
@pytest.mark.faults
def test_two_start_at_once_beside_a_busy_job(ledger: Ledger) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
    try:
        with ledger.trial("driver", "two private Rays started at once on busy cores") as trial:
            started = [
                subprocess.Popen(
                    [sys.executable, "-c", SCRIPT],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for _ in range(2)
            ]
            for process in started:
                said, errors = process.communicate()
                assert process.returncode == 0, errors
                assert "Traceback" not in errors
                pids = [int(pid) for pid in said.strip(" []\n").split(",")]
                assert not [pid for pid in pids if psutil.pid_exists(pid)]
            trial.outcome = "both came up, one after the other"
    finally:
        for process in busy:
            process.kill()
            process.wait()
