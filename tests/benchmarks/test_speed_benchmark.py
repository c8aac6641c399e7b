"""The benchmark of bags runs at tiny size and its figures have the right form; nothing here is about speed."""

import json
from pathlib import Path

import pytest

from benchmarks.mil import mil


def test_it_measures_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--slides=2", "--tiles=40", "--width=8", "--epochs=1", "--heatmap=20", f"--json={tmp_path / 'm.json'}"]
    assert mil.main(argv) in (0, 1)
    result = json.loads((tmp_path / "m.json").read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert set(result["seconds_per_epoch"]) == {"plain", "cached", "streamed"}
    assert result["memory"]["added_mb"] == pytest.approx(3 * 2 * 40 * 8 * 4 / 1e6)
    assert result["memory"]["peak_4x_mb"] > 50
    assert result["heatmap_s"] > 0
