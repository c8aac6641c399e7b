"""The command: which task, which exit code, and the same run continued, exported and looked at."""

import json
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.core.cli import PROJECT_ROOT, parse
from engine.model.cdm import CDM, CDMConfig
from engine.model.zoomldm import ZoomLDM
from engine.train import main
from engine.training.cdm.settings import CDMTrainingConfig
from engine.training.denoiser.settings import JointConfig
from tests.support.forked import start
from tests.support.known_run import tiny_config, write_autoencoder, write_data


def plain(value: Any) -> Any:
    """Return a value as YAML has it."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_data(tmp_path / "data", write_autoencoder(tmp_path / "vae"))
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(plain(asdict(tiny_config(tmp_path)))))
    return path


def test_train_continue_and_export(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", str(config)]
    assert main([*argv, "--export"]) == 1
    assert "must be there to export from" in capsys.readouterr().err
    assert main([*argv, "--train.steps", "2"]) == 0
    assert main([*argv, "--train.steps", "4"]) == 0
    assert "continuing denoiser at step 2 of 4" in (tmp_path / "run" / "log.txt").read_text()
    assert main([*argv, "--export", "--output.folder", str(tmp_path / "again")]) == 0
    ZoomLDM.from_pretrained(tmp_path / "again")
    assert main([*argv, "--seed", "1"]) == 1
    assert "seed was 0, now 1" in capsys.readouterr().err
    assert "seed was 0, now 1" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_that_is_killed_ends_as_an_undisturbed_one(config: Path, tmp_path: Path) -> None:
    """SIGKILL from outside, twice; what is left is the undisturbed run's, to the last byte."""
    argv = ["--config", str(config), "--train.steps", "24"]
    assert main([*argv, "--run", str(tmp_path / "whole"), "--output.folder", str(tmp_path / "whole_model")]) == 0
    log = tmp_path / "run" / "log.jsonl"
    for lines in (2, 5):
        process = start(main, argv)
        while process.is_alive() and (not log.exists() or len(log.read_text().splitlines()) < lines):
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert main(argv) == 0
    assert (tmp_path / "run" / "log.txt").read_text().count("continuing denoiser") == 2
    one, other = (torch.load(tmp_path / name / "denoiser.pt", weights_only=True) for name in ("whole", "run"))
    for part in ("module", "average"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())

    def curve(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    assert curve("run") == curve("whole")
    assert len(curve("run")) == 12


def test_plan_counts_the_set(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(config), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "2 slides, demo" in said
    assert "4 patches = 1 worker(s) x 1 part(s) x 4" in said


def test_an_unknown_key_is_wrong_usage(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(config), "--train.step", "3"])
    assert stop.value.code == 2
    assert "train.steps" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["demo", "cdm"])
@pytest.mark.parametrize("flag", ["--plan", "--export"])
def test_a_task_without_a_plan_says_which_have_one(flag: str, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", task, flag]) == 2
    said = f"{flag} needs the task denoiser or autoencoder; task is {task}. Leave {flag} out."
    assert said in capsys.readouterr().err


def test_figures_reach_tensorboard(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package's extra 'train' brings TensorBoard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["--config", str(config), "--tensorboard", "true"]) == 0
    seen = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = set(seen.Tags()["scalars"])
    assert {"loss", "gradient_norm", "samples_per_s", "lr"} <= tags
    assert any(tag.startswith("loss_at/") for tag in tags)
    assert any(tag.startswith("loss_at_samples/") for tag in tags)
    assert any(tag.startswith("loss_t/") for tag in tags)
    assert [event.step for event in seen.Scalars("loss")] == [2, 4, 6]


@pytest.mark.parametrize(
    ("name", "trained"), [("brca", "439.6"), ("naip", "439.6"), ("panorama", "401.4"), ("vq", "55.3")]
)
def test_the_plan_builds_the_configs_at_their_published_size(
    name: str, trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", f"configs/train_{name}.yaml", "--data", str(tmp_path / "none"), "--plan"]) == 0
    said = capsys.readouterr().out
    assert f"; {trained} M of them are trained" in said
    assert "(as if of one; by default every GPU is one" in said  # they are for a cluster


def test_the_cdms_config_describes_the_published_size() -> None:
    config = parse(["--config", "configs/train_cdm.yaml"], CDMTrainingConfig, "test", "")
    with torch.device("meta"):
        cdm = CDM(CDMConfig(**asdict(config.model)))
    assert sum(p.numel() for p in cdm.parameters()) == pytest.approx(130.7e6, rel=1e-3)


def test_the_demos_trainings_follow_each_other() -> None:
    """What one writes is where the next one starts from, and what the Makefile embeds."""
    argv = {name: ["--config", f"configs/train_demo_{name}.yaml"] for name in ("denoiser", "refine", "cdm")}
    first, second = (parse(argv[name], JointConfig, "test", "") for name in ("denoiser", "refine"))
    cdm = parse(argv["cdm"], CDMTrainingConfig, "test", "")
    assert first.output.folder == second.initial.model
    assert second.output.folder == cdm.source
    copied = next(line for line in (PROJECT_ROOT / "Makefile").read_text().splitlines() if "cp -R" in line).split()
    assert {f"{cdm.source}/.", cdm.out} <= set(copied)
