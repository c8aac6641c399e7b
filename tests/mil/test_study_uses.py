"""What a finished study is for: predict, compare, draw; models and features that are not as they were."""

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from engine.core.errors import EngineError
from engine.core.runtime import one_by_one
from mil import compare as compare_command
from mil import heatmap as heatmap_command
from mil import predict as predict_command
from mil.errors import CohortError, RunError
from mil.fit.store import load_models
from mil.folds.folds import read_predictions
from mil.report.comparison import contenders
from mil.study import prepare, run
from tests.support.known_cohort import CARRYING, KnownCohort, write_slide
from tests.support.known_study import config_of


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
    argv = [str(study), "--slide=P001-S0.svs", f"--picture={tmp_path / 'thumb.jpg'}", f"--out={out}"]
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
    with pytest.raises(EngineError, match="'p001-s0' is near 'P001-S0'"):
        heatmap_command.computed_map(heatmap_command.HeatmapConfig(str(study), "p001-s0"))


def test_features_that_changed_since_are_refused(study: Path, known: KnownCohort, tmp_path: Path) -> None:
    moved = tmp_path / "features"
    shutil.copytree(known.features, moved)
    (moved / "P001-S0.h5").unlink()
    write_slide(moved, "P001-S0", True, True, 0, weights_sha256="ab" * 31 + "cd", block="up.2")
    with pytest.raises(CohortError, match="one encoder"):
        prepare(config_of(KnownCohort(moved, known.labels, {}), tmp_path / "run"))
