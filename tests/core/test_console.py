"""Commands print under any encoding: what it lacks is replaced readably, --help included, and nothing ends there."""

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core.exits import print_anywhere
from tests.test_architecture import COMMANDS, ROOT

TEXT = "0.25 µm/px → 4096² px × 3, M\u00fcller, \u4e16"


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str = "strict") -> io.BytesIO:
    """Put streams of that encoding in the place of stdout and stderr; return where both write."""
    out = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(out, encoding, errors, write_through=True))
    return out


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", "0.25 um/px -> 4096^2 px x 3, Muller, \\u4e16"),
        ("latin-1", "0.25 µm/px -> 4096² px × 3, M\u00fcller, \\u4e16"),
        ("cp1252", "0.25 µm/px -> 4096² px × 3, M\u00fcller, \\u4e16"),
        ("cp437", "0.25 µm/px -> 4096² px x 3, M\u00fcller, \\u4e16"),
        ("utf-8", TEXT),
    ],
)
def test_letters_are_replaced_readably(monkeypatch: pytest.MonkeyPatch, encoding: str, text: str) -> None:
    out = printed(monkeypatch, encoding)
    print_anywhere()
    sys.stdout.write(TEXT)
    assert out.getvalue().decode(encoding) == text


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_bytes_of_file_names_come_out_as_they_are(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out = printed(monkeypatch, encoding)
    print_anywhere()
    sys.stderr.write("slide " + b"M\xfcller.svs".decode("utf-8", "surrogateescape"))
    assert out.getvalue() == b"slide M\xfcller.svs"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command(monkeypatch: pytest.MonkeyPatch, command: str, encoding: str) -> None:
    module = importlib.import_module(command)
    out = printed(monkeypatch, encoding)
    if command == "engine.__main__":  # its own words; it calls the others
        assert module.main(["--help"]) == 0
    else:
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        assert stop.value.code == 0
    assert out.getvalue().decode(encoding).lower().startswith("usage: ")


def test_wrong_usage_with_letters_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    out = printed(monkeypatch, "ascii")
    with pytest.raises(SystemExit):
        importlib.import_module("mil.predict").main(["--modèle=µ"])
    assert b"--modele is not a known flag" in out.getvalue()


def test_a_real_process_without_a_locale(tmp_path: Path) -> None:
    """As a container with LC_ALL=C runs it: the config is read as UTF-8, and names that are missing are printed."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    (tmp_path / "study.yaml").write_text("# \u00b5\nlabels: \u00b5\u2192.csv\n", encoding="utf-8")
    argv = [sys.executable, "-m", "mil.train", f"--config={tmp_path / 'study.yaml'}", f"--features={tmp_path}"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"--labels u->.csv (there is no such file)" in done.stderr
