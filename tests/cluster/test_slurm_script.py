"""configs/cluster/slurm.sh, run with stand-ins for what Slurm, Ray and Python would be; they write down their calls."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "configs" / "cluster" / "slurm.sh"
STAND_INS = {
    "scontrol": """
        echo "scontrol $*" >> "$CALLS"
        if [[ $1 == show ]]; then printf '%s\\n' node-a node-b node-c; fi
        """,
    "hostname": "echo 10.0.0.5 172.17.0.1",
    "srun": """
        while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && export NODE=${1#*=}; shift; done
        exec "$@"
        """,
    "ray": """
        call="ray $* @${NODE:-} $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}"
        if [[ $1 == health-check ]]; then
            grep -q '^ray start --head' "$CALLS" && echo "$call" >> "$CALLS"   # answers when there is a head
            exit
        fi
        if [[ ${HEAD:-} == fails ]]; then exit 1; fi
        trap 'kill $(jobs -p); echo "end @$NODE" >> "$CALLS"; exit 0' TERM
        sleep 60 &
        echo "$call" >> "$CALLS"
        wait
        """,
    "python": """
        until [[ $(grep -c '^ray start' "$CALLS") == 3 ]]; do sleep 0.05; done   # the workers are starting too
        if [[ $DRIVER == waits ]]; then
            trap 'kill $(jobs -p); echo interrupted >> "$CALLS"; sleep 0.3; exit 143' TERM
            sleep 60 &
        fi
        echo "python $* $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> "$CALLS"
        wait
        exit "$DRIVER"
        """,
}
Start = Callable[..., subprocess.Popen[str]]


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start the script as Slurm would: from a spool folder, with a project whose .venv holds the stand-ins."""
    binaries = tmp_path / "project" / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (binaries / name).write_text("#!/bin/bash\n" + body)
        (binaries / name).chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "CALLS": str(tmp_path / "calls"),
        "SLURM_SUBMIT_DIR": str(tmp_path / "project"),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node-[a-c]",
        "SLURM_CPUS_PER_TASK": "16",
    }

    def run(**more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SCRIPT), "--config", "configs/brca.yaml", "--output.folder", "a folder"],
            cwd=tmp_path, env=environment | more, text=True, stderr=subprocess.PIPE,
        )  # fmt: skip

    return run


def wait_for(folder: Path, beginning: str) -> None:
    until = time.monotonic() + 200
    while not any(call.startswith(beginning) for call in calls(folder)):
        assert time.monotonic() < until, f"no call {beginning}...; got {calls(folder)}"
        time.sleep(0.02)


def test_bash_reads_it() -> None:
    read = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.parametrize("code", [0, 3])
def test_head_then_workers_then_the_run_then_the_end(start: Start, tmp_path: Path, code: int) -> None:
    with start(DRIVER=str(code)) as script:
        _, errors = script.communicate(timeout=250)
    assert script.returncode == code, errors
    found = calls(tmp_path)
    heads = [call for call in found if call.startswith("ray start") and "--head" in call]
    workers = [call for call in found if call.startswith("ray start") and "--head" not in call]
    assert len(heads) == 1
    assert "@node-a token 64" in heads[0]
    assert "--node-ip-address=10.0.0.5 --port=24567 --num-cpus=16" in heads[0]
    assert sorted(call.split("@")[1].split()[0] for call in workers) == ["node-b", "node-c"]
    assert all("--address=10.0.0.5:24567" in call and call.endswith("token 64") for call in workers)
    answered = max(i for i, call in enumerate(found) if call.startswith("ray health-check"))
    assert found.index(heads[0]) < answered < min(found.index(call) for call in workers)
    [run] = [call for call in found if call.startswith("python")]
    project = tmp_path / "project"
    flags = "--ray.address 10.0.0.5:24567 --config configs/brca.yaml --output.folder a folder"
    assert run == f"python {project}/generate_large.py {flags} token 64"
    assert sorted(call for call in found if call.startswith("end")) == ["end @node-a", "end @node-b", "end @node-c"]
    assert not any("requeue" in call for call in found)


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_an_interrupted_run_is_queued_again_only_at_the_time_limit(
    start: Start, tmp_path: Path, number: signal.Signals, again: bool
) -> None:
    with start(DRIVER="waits") as script:
        wait_for(tmp_path, "python")
        script.send_signal(number)
        _, errors = script.communicate(timeout=250)
    assert script.returncode == 143, errors
    found = calls(tmp_path)
    assert "interrupted" in found
    assert ("scontrol requeue 1234567" in found) == again
    assert sum(call.startswith("end") for call in found) == 3


def test_a_head_that_does_not_start_is_an_error(start: Start, tmp_path: Path) -> None:
    with start(DRIVER="0", HEAD="fails") as script:
        _, errors = script.communicate(timeout=250)
    assert script.returncode == 1
    assert "10.0.0.5:24567" in errors
    assert not any(call.startswith("python") for call in calls(tmp_path))
