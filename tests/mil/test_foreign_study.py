"""A study of other tools' files and a spreadsheet's table: what passes --plan is trained to the end, what was said."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mil import predict as predict_command
from mil import train as train_command
from tests.support.known_study import QUICK

SLIDES = 24
FEWER = [*QUICK, "--training.epochs=1"]


def bag(number: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(number).normal(size=(12, 4)).astype(np.float32)) + number % 2


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Tensors in four forms, named 0000 to 0023; a table of a German spreadsheet that lost the zeros and has gaps."""
    folder = tmp_path / "features"
    folder.mkdir()
    forms = (lambda t: t, lambda t: t[None], lambda t: t.bfloat16(), lambda t: t.requires_grad_())
    rows = ["patient;slide;hrd_score"]
    for number in range(SLIDES):
        new = bool(number % 3)
        torch.save(forms[number % 4](bag(number)), folder / f"{number:04d}.pt", _use_new_zipfile_serialization=new)
        score = "NA" if number < 2 else "60,5" if number % 2 else "10,25"
        rows.append(f"p{number};{number};{score}")
    torch.save(bag(99), folder / "0099.pt")
    (tmp_path / "labels.csv").write_bytes("\r\n".join(rows).encode("utf-16"))
    return tmp_path


def command(cohort: Path, *more: str) -> list[str]:
    given = [f"--features={cohort / 'features'}", f"--labels={cohort / 'labels.csv'}"]
    return ["--task=hrd", *given, f"--output.folder={cohort / 'run'}", *FEWER, *more]


def test_what_passes_the_plan_is_trained(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command.main(command(cohort, "--plan")) == 0
    told = capsys.readouterr().err
    assert "22 patients (11 HR deficient, 11 HR proficient)" in told
    assert "found 22 slides under another spelling: '10' as '0010'" in told
    assert "left out 2: 0 (no label: hrd_score is 'NA')" in told
    assert "1 features files have no row" in told
    assert not (cohort / "run").exists()
    assert train_command.main(command(cohort)) == 0
    results = json.loads((cohort / "run/metrics.json").read_text())["cohort"]
    assert (results["slides"], len(results["left_out"]), len(results["renamed"])) == (22, 2, 22)
    assert "22 slides were found under another spelling" in (cohort / "run/report.html").read_text()
    argv = [str(cohort / "run"), f"--features={cohort / 'features'}", f"--out={cohort / 'p.csv'}", "--device=cpu"]
    assert predict_command.main(argv) == 0
    assert len((cohort / "p.csv").read_text().splitlines()) == 1 + SLIDES + 1


@pytest.mark.parametrize("more", [["--plan"], []])
def test_bags_that_cannot_be_trained_on_are_named_first(
    cohort: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    for number in (7, 9):
        broken = bag(number)
        broken[3, 1] = float("nan")
        torch.save(broken, cohort / "features" / f"{number:04d}.pt")
    assert train_command.main(command(cohort, *more)) == 1
    told = capsys.readouterr().err
    assert "0007.pt must hold finite features; 1 of 12 rows do not, the first is row 3" in told
    assert "So it is with 1 more: 0009. Nothing was trained." in told
    assert not (cohort / "run/folds").exists()


def test_the_plan_looks_at_the_run_folder_too(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cohort / "run").mkdir()
    (cohort / "run/thesis.doc").write_text("mine")
    assert train_command.main(command(cohort, "--plan")) == 1
    assert "it holds thesis.doc" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["{:.1f}", "{:d}", "{:04d}", "{:04d}.svs"])
def test_clams_splits_by_other_spellings(cohort: Path, capsys: pytest.CaptureFixture[str], spelling: str) -> None:
    train, validation, test = [2, 3, 4, 5], [6, 7], [8, 9]
    rows = [",train,val,test"]
    for at, name in enumerate(train):
        others = [spelling.format(part[at]) if at < 2 else "" for part in (validation, test)]
        rows.append(",".join([str(at), spelling.format(name), *others]))
    (cohort / "splits_0.csv").write_text("\n".join(rows) + "\n")
    assert train_command.main(command(cohort, "--plan", f"--splits={cohort / 'splits_0.csv'}")) == 0
    assert "14 patients are in no part of the split: p10, p11" in capsys.readouterr().err


def test_our_splits_by_another_spelling_are_refused(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [("train", 2), ("train", 3), ("validation", 4), ("validation", 5), ("test", 6), ("test", 7)]
    rows = ["repeat;fold;patient;part", *(f"0;0;{'P' if n == 7 else 'p'}{n};{part}" for part, n in parts)]
    (cohort / "splits.csv").write_text("\n".join(rows))
    assert train_command.main(command(cohort, "--plan", f"--splits={cohort / 'splits.csv'}")) == 1
    assert "only alike, such as 'P7' (near 'p7')" in capsys.readouterr().err
