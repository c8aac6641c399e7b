"""Authentication is chosen before Ray is imported: known token, no token and a cluster, no token and a private Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core.cli import PROJECT_ROOT

SHOW = (
    "import os, sys, actors; print(os.environ['RAY_AUTH_MODE'], 'RAY_AUTH_TOKEN' in os.environ, 'ray' in sys.modules)"
)


NICENESS = "import os, actors; print(os.environ['RAY_worker_niceness'])"


def chosen(home: Path, show: str = SHOW, **environment: str) -> str:
    """Return mode, whether there is a token, and whether Ray was imported, in a fresh process. `show` prints them."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", show], cwd=PROJECT_ROOT, env={**kept, "HOME": str(home), **environment},
        check=True, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "token True False"),
        ({"RAY_ADDRESS": "local"}, "token True False"),
        # A made-up token would make this process refuse the cluster's calls, and every actor die at birth.
        ({"RAY_ADDRESS": "auto"}, "disabled False False"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "disabled False False"),
        ({"RAY_ADDRESS": "auto", "RAY_AUTH_TOKEN": "x"}, "token True False"),
        ({"RAY_AUTH_MODE": "disabled"}, "disabled False False"),
    ],
)
def test_authentication(tmp_path: Path, environment: dict[str, str], expected: str) -> None:
    assert chosen(tmp_path, **environment) == expected


def test_workers_of_a_private_ray_are_as_nice_as_their_driver(tmp_path: Path) -> None:
    assert chosen(tmp_path, NICENESS) == "0"
    assert chosen(tmp_path, NICENESS, RAY_worker_niceness="10") == "10"


def test_a_stored_token_is_used(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert chosen(tmp_path, RAY_ADDRESS="auto") == "token False False"
