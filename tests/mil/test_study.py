"""Training a study, end to end on a small cohort: what it leaves, continues, repeats and refuses."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from engine.core.cli import PROJECT_ROOT, parse
from engine.core.errors import CanvasMismatchError
from engine.core.runtime import one_by_one
from engine.features.config import ExtractConfig
from mil import train as train_command
from mil.data.feature_files import open_features
from mil.errors import LeakageError, RunError
from mil.fit.training import TrainingConfig
from mil.folds.config import StudyConfig
from mil.folds.folds import read_predictions
from mil.study import prepare, run
from tests.support.known_cohort import KnownCohort, read_table, write_cohort, write_slide, write_table
from tests.support.known_study import config_of


def test_what_a_run_leaves(study: Path, known: KnownCohort) -> None:
    results = json.loads((study / "metrics.json").read_text())
    assert results["scales"] == ["20x", "5x"]
    assert results["cohort"]["patients"] == 32
    assert results["pooled"]["model"]["auroc"]["value"] > 0.8
    assert set(results["pooled"]["baseline"]) == {"auroc", "auprc", "balanced_accuracy", "brier"}
    assert sum(results["confusion"].values()) == 32
    assert [sum(f["patients"]["test"].values()) for f in results["folds"]] == [16, 16]
    page = (study / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page
    for patient in known.truth:
        assert f"<td>{patient}</td>" in page
    assert (study / "labels.csv").read_bytes() == known.labels.read_bytes()
    assert {"torch", "scikit-learn", "command"} <= set(json.loads((study / "environment.json").read_text()))


def test_attention_is_stored_with_its_tiles(study: Path, known: KnownCohort) -> None:
    tested = [set(read_predictions(fold).patients) for fold in sorted(study.glob("folds/*"))]
    assert tested[0] | tested[1] == set(known.truth)
    with h5py.File(next(study.glob("folds/*/attention.h5"))) as file:
        name, group = next(iter(file.items()))
        assert group["attention"][()].sum() == pytest.approx(1, abs=1e-5)
        file_of_slide = open_features(known.features / f"{name}.h5")
        np.testing.assert_array_equal(group["coords"][()], file_of_slide.coords("20x"))


def test_a_study_repeats_itself(known: KnownCohort, study: Path, tmp_path: Path) -> None:
    """From its own config.yaml, in another folder: the same weights and figures to the byte."""
    argv = [f"--config={study / 'config.yaml'}", f"--output.folder={tmp_path / 'again'}"]
    assert train_command.main(argv) == 0
    names = [
        "metrics.json",
        "splits.csv",
        "folds/repeat0_fold0/model.safetensors",
        "folds/repeat0_fold1/predictions.csv",
    ]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (study / name).read_bytes(), name


def test_slides_show_the_attended_tiles(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given to a study that is finished, they change nothing but the report."""
    run_of = tmp_path / "run"
    shutil.copytree(study, run_of)
    argv = [f"--config={study / 'config.yaml'}", f"--output.folder={run_of}", f"--slides={tmp_path / 'slides'}"]
    assert train_command.main(argv) == 1
    assert "slides must be a folder" in capsys.readouterr().err
    (tmp_path / "slides").mkdir()
    for number in range(32):
        Image.new("RGB", (64, 48), (230, 180, 210)).save(tmp_path / "slides" / f"P{number:03d}-S0.png")
    assert train_command.main(argv) == 0
    assert "data:image/jpeg" in (run_of / "report.html").read_text()
    assert (run_of / "metrics.json").read_bytes() == (study / "metrics.json").read_bytes()


def test_a_study_is_continued_fold_by_fold(known: KnownCohort, study: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(study, copy)
    shutil.rmtree(copy / "folds" / "repeat0_fold1")
    kept = (copy / "folds/repeat0_fold0/model.safetensors").stat().st_mtime_ns
    said: list[str] = []
    prepared = prepare(config_of(known, copy))
    (copy / "metrics.json").unlink()
    run(prepared, one_by_one, said.append)
    assert said[0] == "1 of 2 folds are done already."
    assert (copy / "folds/repeat0_fold0/model.safetensors").stat().st_mtime_ns == kept
    assert (copy / "metrics.json").read_bytes() == (study / "metrics.json").read_bytes()


def test_another_study_is_refused_in_its_folder(known: KnownCohort, study: Path, tmp_path: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in study.rglob("*.json"))
    with pytest.raises(CanvasMismatchError, match="seed was 0, now 5"):
        run(prepare(config_of(known, study, seed=5)), one_by_one, print)
    assert sorted((p, p.stat().st_mtime_ns) for p in study.rglob("*.json")) == before
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match=r"letter\.txt"):
        run(prepare(config_of(known, tmp_path)), one_by_one, print)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("given", [[], ["--features=nowhere", "--labels=none.csv"]])
def test_without_features_it_says_what_to_do(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command.main(["--task=hrd", *given]) == 1
    told = capsys.readouterr().err
    assert "missing: --features" in told
    assert "python -m engine.extract_features" in told
    assert "python -m mil.train --task hrd --features RUN/features --labels table.csv" in told
    assert "patient, slide, hrd_score" in told


def test_unknown_tasks_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command.main(["--task=hdr"]) == 1
    assert "Did you mean hrd?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        train_command.main(["--training.epoch=3"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("argv", "told"),
    [("--scales=20,10", "lacks 10x"), ("--scales=twenty", "scales must be"), ("--folds=20", "at least 21 patients"),
     ("--splits=none.csv", "--splits must be"), ("--model.name=dsmil --model.fusion=branches", "a form of abmil")],
)  # fmt: skip
def test_bad_wishes(
    known: KnownCohort, capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: str, told: str
) -> None:
    base = [f"--features={known.features}", f"--labels={known.labels}", f"--output.folder={tmp_path}"]
    try:
        code = train_command.main([*base, *argv.split()])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_plan_writes_nothing(known: KnownCohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--features={known.features}", f"--labels={known.labels}", f"--output.folder={tmp_path / 'x'}", "--plan"]
    assert train_command.main(argv) == 0
    assert "32 patients (16 HR deficient, 16 HR proficient), 40 slides" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_shuffled_labels_are_not_learnt(tmp_path: Path) -> None:
    """Through the whole study: held-out figures of labels that mean nothing are chance."""
    shuffled = write_cohort(tmp_path, 40, shuffled=True)
    folder = run(prepare(config_of(shuffled, tmp_path / "run")), one_by_one, print)
    figures = json.loads((folder / "metrics.json").read_text())["pooled"]
    for who in ("model", "baseline"):
        assert figures[who]["auroc"]["low"] < 0.5 < figures[who]["auroc"]["high"]


def test_the_baseline_has_the_models_scaling(known: KnownCohort, study: Path, tmp_path: Path) -> None:
    """Else a table would compare scalings, not models. Scaling is all that sets these two baselines apart."""
    training = TrainingConfig(epochs=1, batch_size=8, scaling="whiten")
    whitened = run(prepare(config_of(known, tmp_path / "run", training=training)), one_by_one, print)
    plain, white = (read_predictions(next(f.glob("folds/*0_fold0")), who="baseline") for f in (study, whitened))
    assert plain.patients == white.patients
    assert not np.allclose(plain.probability, white.probability, atol=1e-3)


def test_the_demos_config_is_one() -> None:
    """It reads the cohort where the Makefile and the extraction's config put it."""
    config = parse(["--config=configs/demo_mil.yaml"], StudyConfig, "train", "")
    extraction = parse(["--config=configs/demo_mil_features.yaml"], ExtractConfig, "extract", "")
    assert config.features == f"{extraction.out}/features"
    assert config.slides == extraction.slides
    assert not extraction.synthetic  # a study would want the patients they were generated from
    makefile = (PROJECT_ROOT / "Makefile").read_text()
    assert f"engine.phantom_cohort --out {Path(extraction.slides).parent}" in makefile
    assert config.labels == str(Path(extraction.slides).parent / "labels.csv")


def test_a_leaking_split_trains_nothing(known: KnownCohort, study: Path, tmp_path: Path) -> None:
    text = (study / "splits.csv").read_text()
    tested = next(line for line in text.splitlines() if line.endswith("test"))
    (tmp_path / "s.csv").write_text(text + tested.replace("test", "train") + "\n")
    with pytest.raises(LeakageError, match="nothing was trained"):
        prepare(config_of(known, tmp_path / "run", splits=str(tmp_path / "s.csv")))


def test_synthetic_bags_must_name_their_source(known: KnownCohort, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(known.features, features)
    write_slide(features, "made", True, True, 1, synthetic=True)
    rows = [{**row, "source_patient": ""} for row in read_table(known.labels)]
    made = {"patient": "M1", "slide": "made", "hrd_score": "99", "hospital": "A", "source_patient": ""}
    for source, code in (("", LeakageError), ("P001", None)):
        write_table(tmp_path / "t.csv", [*rows, {**made, "source_patient": source}])  # type: ignore[list-item]
        config = config_of(KnownCohort(features, tmp_path / "t.csv", {}), tmp_path / "run")
        if code is not None:
            with pytest.raises(code, match="made does not"):
                prepare(config)
            continue
        folds = prepare(config).folds
        assert all(("M1" in fold.train) == ("P001" in fold.train) for fold in folds)
