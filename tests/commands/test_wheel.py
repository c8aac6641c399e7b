"""An installed wheel has all commands, their configurations and tasks; nothing of the checkout is needed."""

import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from engine.__main__ import COMMANDS, main
from tests.support.known_cohort import write_cohort

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("engine", "actors", "mil", "configs", "generate_large.py", "pyproject.toml", "setup.py", "MANIFEST.in")
SOURCES += ("README.md", "LICENSE", "constraints.txt")
TIMEOUT_S = 280
ALL = """
import json, sys

target, calls = sys.argv[1], json.loads(sys.argv[2])

import engine
from engine.__main__ import main

for call in calls:
    sys.stdout.write(f"$ {' '.join(call)}\\n")
    try:
        code = main(call)
    except SystemExit as stop:  # as --help ends
        code = stop.code
    sys.stdout.write(f"code {code or 0}\\n")
import generate_large, mil
for module in (engine, mil, generate_large):
    assert module.__file__.startswith(target), module.__file__
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources: building writes beside them."""
    for needed in ("setuptools", "pip"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed, which builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = ROOT / name, folder / "sources" / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(folder / "sources")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """Install the wheel into an empty environment, which sees the libraries of this one and nothing of the checkout."""
    folder = wheel.parent / "environment"
    venv.create(folder, with_pip=False)
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # Python does not run the .pth files of folders that a .pth file names, so an editable install stays unseen.
    (site_of(folder) / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--no-warn-script-location"]
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", *options, str(wheel)]
    done = subprocess.run([*command, "--ignore-installed"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return folder


def site_of(environment: Path) -> Path:
    """Return the folder that an environment's packages lie in."""
    return next(environment.glob("lib/python*/site-packages"))


@pytest.fixture(scope="module")
def target(environment: Path) -> Path:
    return site_of(environment)


def test_the_wheel_carries_what_commands_look_for(target: Path) -> None:
    shipped = {str(path.relative_to(target / "engine/_configs")) for path in target.glob("engine/_configs/**/*.yaml")}
    ours = {*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/tasks/*.yaml")}
    assert shipped == {str(path.relative_to(ROOT / "configs")) for path in ours}
    assert (target / "engine/model/demo/config.json").is_file()
    assert not (target / "tests").exists()
    (scripts,) = target.glob("*.dist-info/entry_points.txt")
    assert "zoomldm = engine.__main__:main" in scripts.read_text()


def calls(folder: Path) -> Iterator[tuple[list[str], str]]:
    """Yield command lines, and what each says."""
    yield ["generate", "--config", "configs/demo.yaml", "--plan"], "TFLOP"
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "small.png")
    yield ["superres", str(folder / "small.png"), "--scale", "4", "--plan"], "TFLOP"
    (folder / "slides").mkdir()
    PIL.Image.fromarray(pixels).resize((1024, 1024)).save(folder / "slides" / "a.png")
    slides = ["--config", "configs/demo_features.yaml", "--slides", str(folder / "slides"), "--mpp", "0.5"]
    yield ["extract", *slides, "--out", str(folder / "out"), "--dry-run"], "1024x1024"
    yield ["train", "--config", "configs/train_vq.yaml", "--data", str(folder / "none"), "--plan"], "param"
    cohort = write_cohort(folder, patients=20)
    study = ["--features", str(cohort.features), "--labels", str(cohort.labels)]
    yield ["train-mil", "--task", "hrd", *study, "--folds", "2", "--plan"], "code 0"
    asked = {"generate", "superres", "extract", "train", "train-mil"}
    for name in COMMANDS.keys() - asked:
        yield [name, "--help"], "usage:"


def test_every_command_runs_from_elsewhere(environment: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    wanted = list(calls(tmp_path))
    command = [str(environment / "bin/python"), "-c", ALL, str(target), json.dumps([call for call, _ in wanted])]
    variables = {"PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path / "elsewhere", env=variables, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("$ ")[1:]
    assert len(said) == len(wanted) == len(COMMANDS)
    for answer, (call, word) in zip(said, wanted, strict=True):
        assert answer.startswith(" ".join(call))
        assert answer.endswith("code 0\n"), answer + done.stderr
        assert word in answer
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_script_is_there_and_names_all_commands(environment: Path, tmp_path: Path) -> None:
    script = environment / "bin/zoomldm"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, cwd=tmp_path, env={}, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    wrong = subprocess.run([script, "draw"], capture_output=True, text=True, cwd=tmp_path, env={}, timeout=TIMEOUT_S)
    assert wrong.returncode == 2


def test_unknown_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw"]) == 2
    assert "must be one of generate, cohort, superres" in capsys.readouterr().err
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_help_needs_no_heavy_library() -> None:
    code = "import sys; from engine.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
