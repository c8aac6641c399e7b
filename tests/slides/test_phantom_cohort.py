"""The synthetic cohort: its label follows from both signs together and from neither alone, and its table fits mil."""

import csv
from collections import Counter
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score

from engine.phantom_cohort import main
from engine.slides.phantom.cohort import PhantomCohortConfig, draw_cohort
from engine.slides.slide import find_slides, slide_name
from mil.data.cohort import read_labels
from mil.data.tasks import load_task


def test_both_signs_make_a_patient_positive_and_one_alone_tells_little() -> None:
    slides = {s.patient: s for s in draw_cohort(PhantomCohortConfig("", patients=200))}
    signs = [(s.phantom.pleomorphism > 0.42, s.phantom.architecture > 0.42) for s in slides.values()]
    truth = [s.score >= 42 for s in slides.values()]
    assert truth == [fine and coarse for fine, coarse in signs]
    counts = Counter(signs)
    assert counts[True, True] == 80
    assert counts[True, False] == counts[False, True] == 46
    for alone in zip(*signs, strict=True):
        assert roc_auc_score(truth, alone) == pytest.approx(0.808, abs=0.001)


def test_slides_of_a_patient_are_of_one_kind_and_not_the_same_tissue() -> None:
    slides = draw_cohort(PhantomCohortConfig("", patients=11))
    assert [s.slide for s in slides[:3]] == ["P001-1", "P001-2", "P002-1"]
    assert len(slides) == 17
    first, second = slides[0].phantom, slides[1].phantom
    assert first.nuclei + first.ducts == second.nuclei + second.ducts
    assert len({s.phantom.seed for s in slides}) == 17
    assert {s.site for s in slides} == {"site A", "site B", "site C", "site D"}
    assert draw_cohort(PhantomCohortConfig("", patients=11)) == slides
    assert draw_cohort(PhantomCohortConfig("", patients=11, seed=1)) != slides


def test_the_command_writes_what_mil_takes_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--out={tmp_path}", "--patients=4", "--positive=0.5", "--width=300", "--height=256", "--processes=1"]
    assert main(argv) == 0
    assert "6 slides of 4 patients" in capsys.readouterr().out
    cohort = read_labels(tmp_path / "labels.csv", load_task("hrd"))
    assert sum(cohort.labels.values()) == 2
    assert {slide_name(path) for path in find_slides(tmp_path / "slides")} == {s.name for s in cohort.slides}
    with (tmp_path / "labels.csv").open(newline="") as file:
        assert set(next(csv.DictReader(file))) >= {"patient", "slide", "hrd_score", "site"}
    (tmp_path / "slides/P002-1.tiff").unlink()
    before = {path: path.stat().st_mtime_ns for path in find_slides(tmp_path / "slides")}
    assert main(argv) == 0
    after = {path: path.stat().st_mtime_ns for path in find_slides(tmp_path / "slides")}
    assert len(after) == 6
    assert all(after[path] == when for path, when in before.items())


@pytest.mark.parametrize("wrong", ["--positive=1.2", "--patients=0", "--width=100"])
def test_wrong_usage(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([f"--out={tmp_path}", wrong])
    assert stop.value.code == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([f"--out={tmp_path / 'file'}"]) == 1
    assert "cannot be made" in capsys.readouterr().err
