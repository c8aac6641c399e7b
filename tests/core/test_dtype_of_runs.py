"""A run begun where bfloat16 is multiplied goes on where it is not, in bfloat16; so do its plan and its report."""

import json
from pathlib import Path

import pytest
import yaml

import generate_large
from engine.canvas.run_state import RunState, load_state
from engine.canvas.storage import FolderStorage
from tests.commands.test_generate_large import inputs  # noqa: F401  # a fixture

NEW = {"cpu_name": "a newer CPU", "avx512_bf16": True}


def test_resumed_run_of_another_machine_keeps_its_dtype_and_says_so(
    inputs: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    auto = [flag for flag in inputs if not flag.startswith("--model.dtype")]
    argv, save = [*auto, f"--output.folder={tmp_path / 'run'}"], FolderStorage.save

    def save_once(storage: FolderStorage, state: RunState) -> None:
        save(storage, state)
        if state.commits == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch.cpu.get_capabilities", lambda: NEW)
        patch.setattr(FolderStorage, "save", save_once)
        assert generate_large.main(argv) == 130
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["dtype"] == "bfloat16"
    said = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert said["dtype_reason"].startswith("auto: a newer CPU")

    assert generate_large.main([*argv, "--plan"]) == 0
    assert "bfloat16 (auto: as the run began; here it would be float32" in capsys.readouterr().out
    assert generate_large.main([*argv, "--model.dtype=float32"]) == 1
    assert "model.dtype was 'bfloat16', now 'float32'" in capsys.readouterr().err
    assert generate_large.main(argv) == 0
    assert "model.dtype=auto keeps bfloat16, with which this run began" in capsys.readouterr().err
    assert load_state(tmp_path / "run" / "state.json").keys["model.dtype"] == "bfloat16"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["dtype"] == "bfloat16"
    assert report["dtype_reason"].startswith("auto: as the run began")
