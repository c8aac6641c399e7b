import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.parity import is_input, main

SHARED = Path(os.environ.get("ZOOMLDM_SHARED", Path(__file__).parents[2] / "shared")) / "parity"


def replay(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict]:
    code = main([str(folder), "--json", *flags])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.timeout(1800)  # two float64 joint steps take minutes on one core
@pytest.mark.parametrize("name", ["cdm", "encoder", "panorama", "zoomldm"])
def test_the_published_implementations_are_met(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the reference activations are not at {SHARED}; set ZOOMLDM_SHARED")
    torch.set_num_threads(2)
    try:
        code, found = replay(SHARED / name, capsys)
    finally:
        torch.set_num_threads(1)
    assert code == 0, [k for k, v in found.items() if not v["ok"]]
    wanted = {
        key for file in (SHARED / name).glob("expected*.safetensors") for key in load_file(file) if not is_input(key)
    }
    assert set(found) == wanted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with references that it made itself."""
    torch.manual_seed(0)
    model = ZoomLDM(tiny_config())
    model.save_pretrained(tmp_path / "model")
    x, context = torch.randn(2, 3, 64, 64), torch.randn(2, 65, 32)
    t = torch.tensor([500.0, 3.0])
    with torch.no_grad():
        eps = model.predict_eps(x, t, context, 0.0)
    expected = {"unet.x": x, "unet.t": t, "unet.context": context, "unet.eps_ema": eps, "somebody.elses": x.clone()}
    save_file(expected, tmp_path / "model" / "expected.safetensors")
    return tmp_path / "model"


def test_what_is_not_covered_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    table = capsys.readouterr().out
    assert "unet.eps_ema" in table
    assert "1 compared, 0 over tolerance, 1 not covered" in table


def test_a_wrong_answer_is_over_tolerance(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "expected.safetensors"
    expected = load_file(file)
    expected["unet.eps_ema"] = expected["unet.eps_ema"] * 1.001
    save_file(expected, file)
    code, found = replay(folder, capsys)
    assert code == 1
    assert found["unet.eps_ema"]["error"] == pytest.approx(1e-3, rel=0.1)
    assert not found["unet.eps_ema"]["ok"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_arithmetic_can_be_proved_too(folder: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    code, found = replay(folder, capsys, "--dtype", dtype)
    assert code == 0, found


def test_a_folder_without_references_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "must hold reference activations" in capsys.readouterr().err


def test_damaged_references_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "expected.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert main([str(folder)]) == 1
    assert "must be a whole safetensors file" in capsys.readouterr().err


def test_an_encoder_without_its_sizes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"encoder.image": torch.zeros(1, 3, 224, 224), "encoder.cls": torch.zeros(1, 48)}
    save_file(expected, tmp_path / "expected.safetensors")
    (tmp_path / "config.json").write_text('{"embed_dim": 48}')
    assert main([str(tmp_path)]) == 1
    assert "must say the encoder's embed_dim, depth, num_heads and patch_size" in capsys.readouterr().err
