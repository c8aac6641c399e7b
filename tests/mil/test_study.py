"""The commands, end to end on a small cohort: train, continue, refuse, predict, compare, draw."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from engine.arguments import PROJECT_ROOT, parse
from engine.errors import CanvasMismatchError, EngineError
from engine.extraction_config import ExtractConfig
from mil import compare as compare_command
from mil import heatmap as heatmap_command
from mil import predict as predict_command
from mil import train as train_command
from mil.comparison import contenders
from mil.config import ModelSection, StudyConfig, StudyOutput
from mil.errors import CohortError, LeakageError, RunError
from mil.featurefiles import open_features
from mil.folds import one_by_one, read_predictions
from mil.saved import load_models
from mil.study import prepare, run
from mil.training import TrainingConfig
from tests.mil.known_cohort import CARRYING, KnownCohort, read_table, write_cohort, write_slide, write_table

QUICK = [
    *("--folds=2", "--ray.enabled=false", "--device=cpu", "--training.epochs=12", "--training.lr=0.01"),
    *("--training.batch_size=8", "--model.hidden=16", "--model.attention=8", "--model.dropout=0"),
]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownCohort:
    return write_cohort(tmp_path_factory.mktemp("cohort"), 32)


@pytest.fixture(scope="module")
def study(known: KnownCohort) -> Path:
    folder = known.features.parent / "run"
    argv = ["--task=hrd", f"--features={known.features}", f"--labels={known.labels}", f"--output.folder={folder}"]
    assert train_command.main([*argv, *QUICK]) == 0
    return folder


def config_of(known: KnownCohort, folder: Path, **changes: object) -> StudyConfig:
    config = StudyConfig(
        features=str(known.features),
        labels=str(known.labels),
        folds=2,
        device="cpu",
        model=ModelSection(hidden=16, attention=8, dropout=0.0),
        training=TrainingConfig(epochs=12, lr=0.01, batch_size=8),
        output=StudyOutput(str(folder)),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


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


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def predicted(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


def test_predict(study: Path, known: KnownCohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = tmp_path / "new"
    features.mkdir()
    write_slide(features, "yes", True, True, 11)
    write_slide(features, "no", False, False, 12)
    out = tmp_path / "p.csv"
    assert predict_command.main([str(study), f"--features={features}", f"--out={out}", "--device=cpu"]) == 0
    rows = predicted(out)
    assert float(rows["yes"]["probability"]) > float(rows["no"]["probability"])
    assert (rows["yes"]["call"], rows["no"]["call"]) == ("HR deficient", "HR proficient")
    fold = study / "folds" / "repeat0_fold0"
    assert predict_command.main([str(fold), f"--features={features}", f"--out={out}", "--device=cpu"]) == 0
    assert float(predicted(out)["yes"]["fold_deviation"]) == 0
    write_slide(features, "odd", True, True, 13, weights_sha256="ef" * 32)
    assert predict_command.main([str(study), f"--features={features}", f"--out={out}", "--device=cpu"]) == 1
    assert "must come from the model's encoder" in capsys.readouterr().err
    assert "odd" not in predicted(out)


def test_predict_names_slides_without_tiles(study: Path, tmp_path: Path) -> None:
    write_slide(tmp_path, "bare", True, True, 3)
    with h5py.File(tmp_path / "bare.h5", "r+") as file:
        file["20x/valid"][:] = 0  # type: ignore[index]
    argv = [str(study), f"--features={tmp_path}", f"--out={tmp_path / 'p.csv'}", "--device=cpu"]
    assert predict_command.main(argv) == 3
    assert predicted(tmp_path / "p.csv")["bare"]["note"] == "no tiles"


def test_stored_models_judge_as_they_did(study: Path, known: KnownCohort) -> None:
    saved = load_models(study, "cpu")
    assert [s.facts.name for s in saved] == ["repeat0_fold0", "repeat0_fold1"]
    prepared = prepare(config_of(known, study))
    for one, fold in zip(saved, prepared.folds, strict=True):
        tested = read_predictions(one.folder)
        assert set(tested.patients) == fold.test
        (one.folder / "model.safetensors").stat()
    with pytest.raises(RunError, match=r"fold\.json"):
        load_models(known.features)


def test_damaged_weights_are_named(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "run")
    (tmp_path / "run/folds/repeat0_fold0/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"repeat0_fold0/model\.safetensors"):
        load_models(tmp_path / "run", "cpu")


def test_compare(study: Path, known: KnownCohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine = tmp_path / "fine"
    run(prepare(config_of(known, fine, scales="20", splits=str(study / "splits.csv"))), one_by_one, print)
    out = tmp_path / "c"
    argv = [str(study), str(fine), f"--out={out}", "--resamples=200"]
    assert compare_command.main(argv) == 0
    told = capsys.readouterr().out
    assert "32 patients" in told
    result = json.loads((tmp_path / "c.json").read_text())
    assert len(result["figures"]) == 3
    assert len(result["auroc_differences"]) == 3
    assert all(0 <= d["p_value"] <= 1 and d["low"] <= d["value"] <= d["high"] for d in result["auroc_differences"])
    for name in ("c.png", "c_differences.png"):
        assert pixels(tmp_path / name).shape[1] > 300


def test_runs_of_other_patients_are_not_compared(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "other")
    path = tmp_path / "other/folds/repeat0_fold0/predictions.csv"
    path.write_text(path.read_text().replace("test,P00", "test,Q00"))
    with pytest.raises(RunError, match="same patients"):
        contenders([study, tmp_path / "other"])
    with pytest.raises(RunError, match="different folders"):
        contenders([study, study])


def test_a_heatmap_of_a_tested_slide(study: Path, tmp_path: Path) -> None:
    Image.new("RGB", (400, 300), (230, 180, 210)).save(tmp_path / "thumb.jpg")
    out = tmp_path / "map"
    argv = [str(study), "--slide=P001-S0", f"--picture={tmp_path / 'thumb.jpg'}", f"--out={out}"]
    assert heatmap_command.main(argv) == 0
    shapes = json.loads((tmp_path / "map.geojson").read_text())
    assert len(shapes["features"]) == 96
    total = sum(f["properties"]["measurements"]["attention"] for f in shapes["features"])
    assert total == pytest.approx(1, abs=1e-3)
    picture = pixels(tmp_path / "map.png")
    assert picture.shape == (328, 400, 3)
    np.testing.assert_allclose(picture[200, 300], (230, 180, 210), atol=3)  # no tile there
    assert np.abs(picture[45, 10].astype(int) - (230, 180, 210)).max() > 30


def test_a_heatmap_of_a_new_slide(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = tmp_path / "features"
    features.mkdir()
    write_slide(features, "new", True, True, 5)
    argv = [str(study), "--slide=new", f"--out={tmp_path / 'm'}", "--device=cpu", "--max_px=200"]
    assert heatmap_command.main(argv) == 1
    assert "Pass --features" in capsys.readouterr().err
    (tmp_path / "thumbnails").mkdir()
    Image.new("RGB", (100, 75)).save(tmp_path / "thumbnails" / "new.png")
    assert heatmap_command.main([*argv, f"--features={features}"]) == 0
    assert "drawn on white" not in capsys.readouterr().err
    ranks = {tuple(f["geometry"]["coordinates"][0][0]): f["properties"]["measurements"]["rank"]
             for f in json.loads((tmp_path / "m.geojson").read_text())["features"]}  # fmt: skip
    carrying = [rank for (x, _), rank in ranks.items() if x // 2048 in CARRYING]
    assert np.mean(carrying) > np.mean(list(ranks.values()))


def test_pictures_that_cannot_be_placed(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (300, 300)).save(tmp_path / "square.png")
    argv = [str(study), "--slide=P001-S0", f"--out={tmp_path / 'm'}"]
    assert heatmap_command.main([*argv, f"--picture={tmp_path / 'square.png'}"]) == 1
    assert "another shape" in capsys.readouterr().err
    assert heatmap_command.main([*argv, f"--picture={tmp_path / 'none.png'}"]) == 1
    with pytest.raises(EngineError, match="P999"):
        heatmap_command.computed_map(heatmap_command.HeatmapConfig(str(study), "P999"))


def test_features_that_changed_since_are_refused(study: Path, known: KnownCohort, tmp_path: Path) -> None:
    moved = tmp_path / "features"
    shutil.copytree(known.features, moved)
    (moved / "P001-S0.h5").unlink()
    write_slide(moved, "P001-S0", True, True, 0, weights_sha256="ab" * 31 + "cd", block="up.2")
    with pytest.raises(CohortError, match="one encoder"):
        prepare(config_of(KnownCohort(moved, known.labels, {}), tmp_path / "run"))
