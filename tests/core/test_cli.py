"""Command lines and config files: every recipe loads, every mistake ends with code 2 and the nearest name."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import yaml

from engine.core.cli import PROJECT_ROOT, parse, parse_with_flags, peek, take
from engine.sampling.config import RunConfig

OTHERS = ("train_", "prepare_", "cohort_", "augment_", "demo_features", "demo_mil")
"""Configs of other commands."""
RECIPES = sorted(p for p in (PROJECT_ROOT / "configs").glob("*.yaml") if not p.name.startswith(OTHERS))


def read(*argv: str) -> RunConfig:
    return parse(argv, RunConfig, "generate_large.py", "text")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        read(*argv)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_loads(path: Path) -> None:
    assert isinstance(read("--config", str(path)), RunConfig)


def test_there_are_recipes() -> None:
    assert {p.stem for p in RECIPES} >= {"demo", "brca", "brca_published", "naip", "panorama"}


def test_no_argument_gives_the_defaults() -> None:
    assert read() == RunConfig()


def test_flags_override_the_file_and_types_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("canvas: {height: 512, width: 768}\nsampling: {weight: 3}\n")
    config = read("--config", str(file), "--canvas.height", "1024", "--canvas.levels", "[1.25x, 20x]")
    assert (config.canvas.height, config.canvas.width) == (1024, 768)
    assert config.canvas.levels == ("1.25x", "20x")
    assert isinstance(config.sampling.weight, float)
    assert config.sampling.weight == 3.0


def test_config_is_found_in_the_project_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("--config", "configs/demo.yaml").output.folder == "runs/demo"
    assert read("--config=configs/demo.yaml").output.folder == "runs/demo"


def test_a_file_here_wins_over_the_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("sampling: {seed: 7}")
    assert read("--config", "configs/demo.yaml").sampling.seed == 7


def test_resolved_config_reads_back(tmp_path: Path) -> None:
    config = read("--config", "configs/brca_published.yaml", "--canvas.levels", "[5x, 20x]")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    assert read("--config", str(file)) == config


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("canvas: {hieght: 512}", "canvas.hieght", "canvas.height"),
        ("sampling: {sead: 1}", "sampling.sead", "sampling.seed"),
        ("hight: 512", "hight", "canvas.height"),
        ("guidence: {method: none}", "guidence", "guidance"),
    ],
)
def test_unknown_key_names_file_and_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, wrong: str, nearest: str
) -> None:
    file = tmp_path / "mistake.yaml"
    file.write_text(text)
    message = refused(capsys, "--config", str(file))
    assert "mistake.yaml" in message
    assert f"{wrong} is not a known key" in message
    assert f"did you mean {nearest}" in message


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--canvas.hight", "--canvas.height"),
        ("--seed", "--sampling.seed"),
        ("--sampling.tile-stride", "--sampling.tile_stride"),
    ],
)
def test_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str], flag: str, nearest: str) -> None:
    assert f"{flag} is not a known flag; did you mean {nearest}?" in refused(capsys, flag, "3")
    assert nearest in refused(capsys, f"{flag}=3")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--canvas.height", "128"), "canvas.height must be at least 256 px; got 128"),
        (("--canvas.height", "tall"), "canvas.height"),
        (("--guidance.method", "newtons"), "'newton', 'linear', 'none'"),
        (("--sampling.tile_stride", "80"), "1..64"),
        (("--reference", "a.png", "--embeddings", "b.npy"), "exclude each other"),
        (("--canvas", "512"), "--canvas.height"),
        (("--canvas.store", "/data/canvas"), "canvas.store must begin with one of s3://, gs://, az://, file://"),
        (("--canvas.store", "s3:///run"), "canvas.store must be scheme://bucket/prefix"),
        (("--canvas.store", "file://data/run"), "file:///absolute/folder"),
        (("512",), "unrecognized"),
        (("--config", "nowhere.yaml"), "nowhere.yaml is neither here"),
        (("--config",), "--config"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], says: str) -> None:
    assert says in refused(capsys, *argv)


@pytest.mark.parametrize("url", ["s3://me:hunter2@bucket/run", "s3://b/run?sig=hunter2", "az://c/run#hunter2"])
def test_a_credential_in_the_store_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str], url: str) -> None:
    message = refused(capsys, "--canvas.store", url)
    assert "credentials into the environment" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("canvas: 512", "canvas must hold keys such as canvas.height"),
        ("- 1\n- 2", "the file must hold keys"),
        ("canvas: {height: [", "must be YAML"),
        ("canvas: {height: tall}", "canvas.height"),
        ("canvas: {height: 100}", "at least 256 px"),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    message = refused(capsys, "--config", str(file))
    assert "wrong.yaml" in message
    assert says in message


def test_a_flag_is_not_blamed_on_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "right.yaml"
    file.write_text("canvas: {height: 512}")
    assert "right.yaml" not in refused(capsys, "--config", str(file), "--canvas.height", "100")


def test_help_explains_every_key_with_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--canvas.height HEIGHT Height in px, at least 256." in text
    assert "Distance between tiles in latent px" in text


def test_switches_are_told_apart_from_keys() -> None:
    config, given = parse_with_flags(["--plan"], RunConfig, "x", "y", {"plan": "stop", "other": "not given"})
    assert given == {"plan"}
    assert config == RunConfig()


@pytest.mark.parametrize(
    ("words", "own", "rest"),
    [
        ("--a 1 RUN", ["RUN", "--a", "1"], []),
        ("--a=1 --c=2 RUN", ["RUN", "--a=1"], ["--c=2"]),
        ("--c 2 --a 1", ["--a", "1"], ["--c", "2"]),
        ("RUN --a 1 --c", ["--a", "1"], ["RUN", "--c"]),
        ("RUN", ["RUN"], []),
        ("--a -1 --c -2 RUN", ["RUN", "--a", "-1"], ["--c", "-2"]),
    ],
)
def test_flags_of_one_schema_are_taken_out(words: str, own: list[str], rest: list[str]) -> None:
    @dataclass(frozen=True)
    class Own:
        a: int = 0

    assert take(words.split(), Own) == (own, rest)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "first"),
        (["--config", "FILE"], "second"),
        (["--config=FILE", "--task", "first"], "first"),
        (["--task=second", "--other", "first"], "second"),
        (["--config", "nowhere.yaml"], "first"),
    ],
)
def test_a_key_is_known_before_the_schema(tmp_path: Path, words: list[str], name: str) -> None:
    (tmp_path / "a.yaml").write_text("task: second\nwidth: 3\n")
    argv = [word.replace("FILE", str(tmp_path / "a.yaml")) for word in words]
    assert peek(argv, "task", ["first", "second"], "prog") == name


def test_an_unknown_task_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        peek(["--task", "third"], "task", ["first", "second"], "prog")
    assert stopped.value.code == 2
    assert "task must be one of first, second; got 'third'" in capsys.readouterr().err


def test_keys_of_the_last_release_are_ignored_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("guidance: {strength: 0.7, iterations: 20}\noutput: {record_writers: false}\n")
    before = file.read_text()
    argv = ["--config", str(file), "--output.record_writers", "true", "--sampling.seed=3"]
    config = parse(argv, RunConfig, "generate_large.py", "about")
    assert (config.guidance.strength, config.sampling.seed) == (0.7, 3)
    said = capsys.readouterr().err
    assert said.count("is ignored, and an error in the next release") == 3
    assert f"{file}: guidance.iterations is ignored" in said
    assert file.read_text() == before
