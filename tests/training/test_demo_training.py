"""The demo's run folder belongs to one configuration: the files of its stages do not say what they were made with."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from engine.training.demo import run as demo_training
from engine.training.optimisation import TrainingError
from engine.training.settings import DataSettings, DemoConfig, ModelSettings


class Reached(Exception):
    pass


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoConfig:
    """A run that was begun before folders were compared, by a training that stops where it would render regions."""
    config = DemoConfig(run=str(tmp_path / "run"), out=str(tmp_path / "model"), bfloat16=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")

    def stop(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(demo_training, "render_regions", stop)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # it would outlive the test
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"data": DataSettings(region_cells=16)}, r"data\.region_cells was 32, now 16"),
        ({"model": ModelSettings(vae_channels=(8, 8, 8))}, r"model\.vae_channels was \[32, 32, 64\], now \[8, 8, 8\]"),
        ({"bfloat16": False}, "bfloat16 was True, now False"),
    ],
)
def test_a_run_of_other_settings_is_refused(begun: DemoConfig, change: dict[str, Any], message: str) -> None:
    path = Path(begun.run) / "config.json"
    before = path.read_bytes()
    with pytest.raises(TrainingError, match=rf"config\.json must belong to this run.*{message}.*another run folder"):
        demo_training.train(replace(begun, **change))
    assert path.read_bytes() == before


def test_a_run_goes_on_with_the_same_settings_elsewhere(begun: DemoConfig) -> None:
    for config in (begun, replace(begun, out="elsewhere", threads=1, device="auto", checkpoint_s=5.0)):
        with pytest.raises(Reached):
            demo_training.train(config)
        assert json.loads((Path(begun.run) / "config.json").read_text()) == json.loads(json.dumps(asdict(config)))


def test_a_new_folder_gets_its_configuration_first(begun: DemoConfig, tmp_path: Path) -> None:
    with pytest.raises(Reached):
        demo_training.train(replace(begun, run=str(tmp_path / "new"), seed=1))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["seed"] == 1
