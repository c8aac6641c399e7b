"""model.dtype=auto: what is chosen on which hardware, and that a run keeps what it began with."""

import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from engine.canvas.environment import check_environment
from engine.canvas.run_state import Progress, RunState, save_state
from engine.core.config import ModelConfigSection
from engine.core.runtime import (
    Hardware,
    choose_dtype,
    cpu_hardware,
    cuda_hardware,
    explain_dtype,
    facts_of,
    hardware_of,
    keep_freed_memory,
    remark_on_dtype,
    settle_dtype,
    torch_dtype,
)
from engine.generation.run import settle_run
from engine.sampling.config import OutputConfig, RunConfig
from engine.training.denoiser.settings import InitialSettings, JointConfig
from engine.training.precision import settle_bfloat16, settle_precision
from engine.training.settings import DemoConfig, settled

CAPABILITIES = torch.cpu.get_capabilities()
OLD_CPU = cpu_hardware({"cpu_name": "AMD EPYC", "avx2": True, "avx512_bf16": False})
NEW_CPU = cpu_hardware({"cpu_name": "Xeon", "avx2": True, "avx512_bf16": True, "amx_bf16": True})


def nobody() -> Hardware:
    raise AssertionError("nobody must be asked")


@pytest.mark.parametrize(
    ("hardware", "dtype", "said"),
    [
        (OLD_CPU, "float32", "AMD EPYC multiplies no bfloat16"),
        (NEW_CPU, "bfloat16", "Xeon multiplies bfloat16 (AMX)"),
        (cpu_hardware({"cpu_name": "Zen 4", "avx512_bf16": True}), "bfloat16", "(AVX512-BF16)"),
        (cpu_hardware({"cpu_name": "Neoverse", "neon": True, "bf16": True}), "bfloat16", "(Arm bf16)"),
        (cpu_hardware({"cpu_name": "M1", "neon": True, "bf16": False}), "float32", "M1"),
        (cuda_hardware("A100", (8, 0)), "bfloat16", "(compute capability 8.0)"),
        (cuda_hardware("T4", (7, 5)), "float16", "T4 (7.5) multiplies no bfloat16"),
    ],
)
def test_dtype_follows_what_multiplies_bfloat16(hardware: Hardware, dtype: str, said: str) -> None:
    choice = choose_dtype(hardware)
    assert choice.dtype == dtype
    assert said in choice.reason


def test_torch_tells_of_this_cpu() -> None:
    assert CAPABILITIES["architecture"] == platform.machine()
    assert (cpu_hardware(CAPABILITIES).bfloat16 is not None) >= torch.cpu._is_avx512_bf16_supported()
    assert hardware_of("cpu") == Hardware("cpu", "a CPU of the tests", None)  # conftest.py


def test_what_is_asked_for_is_taken_and_nobody_is_asked() -> None:
    assert settle_dtype("float64", lambda: "bfloat16", nobody) == "float64"
    assert settle_dtype("auto", lambda: "bfloat16", nobody) == "bfloat16"
    assert settle_dtype("auto", lambda: None, lambda: NEW_CPU) == "bfloat16"
    with pytest.raises(ValueError, match="must be settled"):
        torch_dtype("auto")


def test_resumed_run_keeps_its_dtype(tmp_path: Path) -> None:
    config = RunConfig(output=OutputConfig(folder=str(tmp_path)))
    assert settle_run(config, None, lambda: OLD_CPU).model.dtype == "float32"
    save_state(tmp_path / "state.json", RunState({"model.dtype": "bfloat16"}, Progress(), {}))
    assert settle_run(config, None, nobody).model.dtype == "bfloat16"
    other = replace(config, model=ModelConfigSection(dtype="float32"))
    assert settle_run(other, None, nobody).model.dtype == "float32"  # refused later, by the run's keys


@pytest.mark.parametrize(
    ("asked", "used", "hardware", "line"),
    [
        ("auto", "bfloat16", OLD_CPU, "auto keeps bfloat16, with which this run began; here it would be float32"),
        ("auto", "float32", NEW_CPU, "auto keeps float32"),
        ("bfloat16", "bfloat16", OLD_CPU, "several times slower here than float32: AMD EPYC"),
        ("auto", "float32", OLD_CPU, None),
        ("bfloat16", "bfloat16", NEW_CPU, None),
        ("bfloat16", "bfloat16", cuda_hardware("T4", (7, 5)), None),
        ("float32", "float32", NEW_CPU, None),
    ],
)
def test_one_line_where_the_dtype_surprises(asked: str, used: str, hardware: Hardware, line: str | None) -> None:
    said = remark_on_dtype(asked, used, hardware)
    assert (said is None) if line is None else (said is not None and line in said and "\n" not in said)


def test_environment_says_the_dtype_and_why(tmp_path: Path) -> None:
    check_environment(tmp_path, facts_of("auto", "float32", OLD_CPU))
    stored = json.loads((tmp_path / "environment.json").read_text())
    assert stored["dtype"] == "float32"
    assert stored["dtype_reason"] == "auto: AMD EPYC multiplies no bfloat16"
    assert explain_dtype("float32", "float32", NEW_CPU) == "as configured"
    assert "as the run began" in explain_dtype("auto", "bfloat16", OLD_CPU)
    del stored["dtype"], stored["dtype_reason"]  # as runs of older versions have it
    (tmp_path / "environment.json").write_text(json.dumps(stored))
    check_environment(tmp_path, facts_of("auto", "float32", OLD_CPU))


def test_training_settles_and_keeps_its_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = JointConfig(run=str(tmp_path), initial=InitialSettings(vae="anywhere"))
    assert config.precision == "auto"
    assert settle_precision(config, lambda: OLD_CPU).precision == "float32"
    (tmp_path / "config.json").write_text(json.dumps({"precision": "bfloat16", "bfloat16": True}))
    assert settle_precision(config, lambda: OLD_CPU).precision == "bfloat16"
    assert "precision=auto keeps bfloat16" in caplog.text
    demo = DemoConfig(run=str(tmp_path))
    with pytest.raises(ValueError, match="must be settled"):
        settled(demo.bfloat16)
    assert settled(settle_bfloat16(demo).bfloat16)
    assert settled(settle_bfloat16(replace(demo, run=str(tmp_path / "new"))).bfloat16) == (
        choose_dtype(hardware_of("cpu")).dtype == "bfloat16"
    )


def test_published_recipes_alone_name_a_dtype() -> None:
    configs = Path(__file__).parents[2] / "configs"
    named = {}
    for path in configs.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        model = content.get("model")
        named[path.stem] = content.get("precision", model.get("dtype") if isinstance(model, dict) else None)
    assert {name: value for name, value in named.items() if value not in (None, "auto")} == {
        "brca_published": "float32",
        "panorama": "bfloat16",
    }


def test_kept_memory_leaves_bytes_and_gpus_alone() -> None:
    assert not keep_freed_memory("cuda")
    net = torch.nn.Conv2d(3, 8, 3)
    x = torch.ones(1, 3, 512, 512)
    before = net(x)
    keep_freed_memory("cpu")
    assert torch.equal(net(x), before)


def test_one_process_is_pinned_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica and a run without Ray must take the same kernels; cuBLAS reads its workspace from the environment."""
    from actors import denoiser_actor
    from engine.core import runtime

    assert denoiser_actor.pin_arithmetic is runtime.pin_arithmetic
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    runtime.pin_arithmetic(1)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
