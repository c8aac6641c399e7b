"""Arms share patients, synthetic bags stay on their source's side, and what does not fit is named before training."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.cohort.config import CohortConfig
from engine.cohort.table import Row
from engine.cohort.table import read_table as read_asked
from engine.core.cli import PROJECT_ROOT, parse
from engine.core.errors import CanvasMismatchError, EngineError
from engine.core.runtime import one_by_one
from engine.model.weights.training_slides import read_training_slides, write_training_slides
from mil import augment as augment_command
from mil.augmentation.config import ARMS, AugmentConfig
from mil.augmentation.page import verdict
from mil.augmentation.protocol import _trials, plan, real_folds, run
from mil.augmentation.trials import Trial, training_part
from mil.augmentation.wanted import write_wanted
from mil.errors import CohortError, LeakageError, RunError, SplitError, StudyError
from mil.fit.training import TrainingConfig
from mil.folds.config import ModelSection, StudyOutput
from tests.support.known_cohort import KnownCohort, read_table, write_slide, write_synthetic, write_table


@pytest.fixture(scope="module")
def synthetic(known: KnownCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two synthetic bags of each patient, with the signs of its class."""
    return write_synthetic(tmp_path_factory.mktemp("synthetic"), known)


def config_of(known: KnownCohort, synthetic: Path | None, folder: Path, **changes: object) -> AugmentConfig:
    config = AugmentConfig(
        features=str(known.features),
        labels=str(known.labels),
        synthetic=None if synthetic is None else str(synthetic),
        fractions=(0.25, 1.0),
        folds=2,
        device="cpu",
        model=ModelSection(hidden=8, attention=4, dropout=0.0),
        training=TrainingConfig(epochs=3, lr=0.01, batch_size=8),
        output=StudyOutput(str(folder)),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(known: KnownCohort, synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "augment"
    return run(plan(config_of(known, synthetic, folder)), one_by_one, print)


def trials_of(known: KnownCohort, synthetic: Path, tmp_path: Path, **changes: object) -> dict[tuple[float, str], Trial]:
    planned = plan(config_of(known, synthetic, tmp_path, **changes))
    first = planned.study.folds[0].name
    return {(t.fraction, t.arm): t for t in _trials(planned, "") if t.fold.name == first}


def test_arms_share_their_patients(known: KnownCohort, synthetic: Path, tmp_path: Path) -> None:
    trials = trials_of(known, synthetic, tmp_path)
    for fraction in (0.25, 1.0):
        assert len({trials[fraction, arm].fold for arm in ARMS}) == 1
        assert len({trials[fraction, arm].classifier["seed"] for arm in ARMS}) == 1
    few, all_ = trials[0.25, "real"].fold, trials[1.0, "real"].fold
    assert few.train < all_.train
    assert few.validation <= all_.validation
    assert few.test == all_.test
    assert abs(len(few.train) - 0.25 * len(all_.train)) <= 1  # each class is rounded
    labels = trials[1.0, "real"].cohort.labels
    assert {labels[p] for p in few.train} == {labels[p] for p in few.validation} == {0, 1}


def test_what_each_arm_learns_from(known: KnownCohort, synthetic: Path, tmp_path: Path) -> None:
    trials = trials_of(known, synthetic, tmp_path)
    parts = {arm: training_part(trials[0.25, arm]) for arm in ARMS}
    names = {arm: [bag.name for bag in part.bags] for arm, part in parts.items()}
    real, patients = names["real"], trials[0.25, "real"].fold.train
    assert names["real_twice"] == [*real, *real]
    assert names["real_noise"] == [*real, *(f"{name} with noise" for name in real)]
    assert names["synthetic"] == [f"made-{p}-{i}" for p in sorted(patients) for i in range(2)]
    assert names["real_synthetic"] == [*real, *names["synthetic"]]
    for part in parts.values():
        assert set(part.groups) <= patients
        assert [known.truth[p] for p in part.groups] == part.labels.tolist()
    clean, noisy = parts["real_noise"].bags[0].read(), parts["real_noise"].bags[len(real)].read()
    assert 0.3 < np.abs(noisy - clean).mean() / clean.std() < 0.6
    np.testing.assert_array_equal(noisy, training_part(trials[0.25, "real_noise"]).bags[len(real)].read())


def test_a_bag_of_a_tested_patient_is_never_learnt_from(known: KnownCohort, synthetic: Path, tmp_path: Path) -> None:
    trials = trials_of(known, synthetic, tmp_path)
    with_bags = trials[0.25, "real_synthetic"]
    assert {slide.source for slide in with_bags.synthetic} == with_bags.fold.train
    tested = next(iter(with_bags.fold.test))
    stranger = replace(with_bags.synthetic[0], source=tested)
    with pytest.raises(LeakageError, match="a patient that its arm trains on"):
        replace(with_bags, synthetic=(*with_bags.synthetic, stranger))
    validated = replace(with_bags.synthetic[0], source=next(iter(with_bags.fold.validation)))
    with pytest.raises(LeakageError, match="a patient that its arm trains on"):
        replace(with_bags, synthetic=(validated,))


def test_what_is_told_of_synthetic_bags_is_of_tested_patients(
    finished: Path, known: KnownCohort, synthetic: Path, tmp_path: Path
) -> None:
    trials = trials_of(known, synthetic, tmp_path)
    for (_, arm), trial in trials.items():
        assert {slide.source for slide in trial.judged} == (trial.fold.test if arm == "real" else set())
    kept = json.loads((finished / "metrics.json").read_text())["kept"]
    assert kept["patients"] == 32
    assert kept["fraction"] == 1
    assert kept["synthetic"]["value"] > 0.6  # they have the signs of their class
    assert kept["synthetic"]["value"] != kept["real"]["value"]
    assert "from their synthetic ones" in (finished / "report.html").read_text()


def test_synthetic_bags_that_lost_their_sign_are_found_out(known: KnownCohort, tmp_path: Path) -> None:
    """Real bags teach that bags with the other class's signs are the other's, whatever the table says."""
    swapped = write_synthetic(tmp_path / "swapped", known, swapped=True)
    few = {"arms": ("real", "real_synthetic"), "fractions": (1.0,)}
    run(plan(config_of(known, swapped, tmp_path / "run", **few)), one_by_one, print)
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())["kept"]
    assert kept["synthetic"]["value"] < 0.4 < 0.6 < kept["real"]["value"]


def test_what_a_run_leaves(finished: Path, known: KnownCohort) -> None:
    results = json.loads((finished / "metrics.json").read_text())
    assert [(row["fraction"], row["arm"]) for row in results["arms"]] == [(f, a) for f in (0.25, 1.0) for a in ARMS]
    assert results["patients"] == 32
    for row in results["arms"]:
        assert ("real_synthetic_minus_this" in row) == (row["arm"] != "real_synthetic")
        assert row["auroc"]["low"] <= row["auroc"]["value"] <= row["auroc"]["high"]
    rows = list(csv.DictReader((finished / "augmentation.csv").read_text().splitlines()))
    assert len(rows) == 10
    treated = {row["arm"]: float(row["auroc"]) for row in rows if row["fraction"] == "1.0"}
    told = next(r for r in rows if r["arm"] == "real" and r["fraction"] == "1.0")["real_synthetic_minus_this"]
    assert float(told) == pytest.approx(treated["real_synthetic"] - treated["real"])
    page = (finished / "report.html").read_text()
    assert "is unknown: its list of training slides is absent" in page
    assert page.count("<svg") == 1
    tested = read_table(finished / "folds/repeat0_fold0_fraction0.25_synthetic/predictions.csv")
    assert {row["patient"] for row in tested} <= set(known.truth)
    assert len(list(finished.glob("folds/*/fold.json"))) == 20
    assert (finished / "augmentation.png").stat().st_size > 5000


def test_a_run_is_continued_and_another_refused(
    finished: Path, known: KnownCohort, synthetic: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "folds" / "repeat0_fold1_fraction1_real_noise")
    (copy / "metrics.json").unlink()
    said: list[str] = []
    run(plan(config_of(known, synthetic, copy)), one_by_one, said.append)
    assert said[0] == "19 of 20 trainings are done already."
    assert (copy / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()
    with pytest.raises(CanvasMismatchError, match=r"noise was 0\.5, now 0\.7"):
        run(plan(config_of(known, synthetic, copy, noise=0.7)), one_by_one, print)


def test_the_command(known: KnownCohort, synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--features={known.features}", f"--labels={known.labels}", "--folds=2", "--ray.enabled=false"]
    argv += ["--arms=[real,real_synthetic]", "--fractions=[1.0]", "--training.epochs=1", "--model.hidden=8"]
    argv += [f"--synthetic={synthetic}", f"--output.folder={tmp_path / 'r'}", "--device=cpu"]
    assert augment_command.main([*argv, "--plan"]) == 0
    assert not (tmp_path / "r").exists()
    assert "4 trainings: real, real_synthetic" in capsys.readouterr().err
    assert augment_command.main(argv) == 0
    assert "real + synthetic minus this arm" in capsys.readouterr().out
    again = [f"--config={tmp_path / 'r' / 'config.yaml'}"]
    assert augment_command.main(again) == 0


def changed(synthetic: Path, folder: Path, **cells: str) -> Path:
    """Copy the synthetic folder, with other cells in its first row."""
    shutil.copytree(synthetic, folder)
    rows = read_table(folder / "cohort.csv")
    rows[0] |= cells
    write_table(folder / "cohort.csv", rows)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(
    ("cells", "error", "told"),
    [
        ({"source_patient": "Q9"}, LeakageError, "'Q9' is none"),
        ({"patient": "P002"}, LeakageError, "gives it to P002, who may be tested"),
        ({"source_patient": "-"}, CohortError, "every row needs a source_patient"),
        ({"label": ""}, CohortError, "every row needs a label"),
        ({"label": "no such"}, EngineError, "no such"),
        ({"label": "HR deficient"}, CohortError, "P000 is HR proficient, the row says HR deficient"),
        ({"label": "70"}, CohortError, "P000 is HR proficient, the row says HR deficient"),
        ({"name": "made-P000-1"}, CohortError, "made-P000-1 comes more than once"),
        ({"name": "P000-S0"}, CohortError, "must not be called as a real slide"),
        ({"name": "unheard"}, CohortError, r"there is no unheard\.h5"),
    ],
)
def test_rows_that_do_not_fit(
    known: KnownCohort, synthetic: Path, tmp_path: Path, cells: dict[str, str], error: type[Exception], told: str
) -> None:
    folder = changed(synthetic, tmp_path / "s", **cells)
    with pytest.raises(error, match=told):
        plan(config_of(known, folder, tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_a_label_may_be_what_the_rule_reads(known: KnownCohort, synthetic: Path, tmp_path: Path) -> None:
    other = plan(config_of(known, changed(synthetic, tmp_path / "s", label="12"), tmp_path / "r"))
    plain = plan(config_of(known, synthetic, tmp_path / "r"))
    assert [(s.name, s.label) for s in other.synthetic.slides] == [(s.name, s.label) for s in plain.synthetic.slides]


def test_bags_that_do_not_fit(known: KnownCohort, synthetic: Path, tmp_path: Path) -> None:
    for changes, told in (({"tiles": 97}, "at least 97 tiles"), ({"amount": 3}, "P0.. has 2")):
        with pytest.raises(CohortError, match=told):
            plan(config_of(known, synthetic, tmp_path / "r", **changes))
    folder = changed(synthetic, tmp_path / "s")
    for name, change, told in (
        ("made-P000-0", {"synthetic": False}, "must say that it is synthetic"),
        ("made-P001-0", {"weights_sha256": "ef" * 32}, "real bags' encoder"),
    ):
        path = folder / "features" / f"{name}.h5"
        kept = path.read_bytes()
        path.unlink()
        write_slide(folder / "features", name, True, True, 7, **{"synthetic": True, **change})
        with pytest.raises(CohortError, match=told):
            plan(config_of(known, folder, tmp_path / "r"))
        path.write_bytes(kept)
    with pytest.raises(CohortError, match=r"no such table"):
        plan(config_of(known, known.features, tmp_path / "r"))
    with pytest.raises(StudyError, match="need --synthetic"):
        plan(config_of(known, None, tmp_path / "r"))


def test_a_fraction_that_leaves_a_class_empty(known: KnownCohort, synthetic: Path, tmp_path: Path) -> None:
    with pytest.raises(SplitError, match=r"0\.05 of .* leaves none"):
        plan(config_of(known, synthetic, tmp_path / "r", fractions=(0.05,)))


def test_a_class_without_synthetic_bags(known: KnownCohort, synthetic: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(synthetic, folder)
    rows = [row for row in read_table(folder / "cohort.csv") if row["label"] == "HR deficient"]
    write_table(folder / "cohort.csv", rows)  # type: ignore[arg-type]
    with pytest.raises(CohortError, match="has none of HR proficient"):
        plan(config_of(known, folder, tmp_path / "r"))


def test_a_synthetic_slide_among_the_real_ones(known: KnownCohort, synthetic: Path, tmp_path: Path) -> None:
    rows = read_table(known.labels)
    for row in rows:
        row["source_patient"] = row["patient"] if row["slide"] == "P001-S0" else ""
    write_table(tmp_path / "labels.csv", rows)  # type: ignore[arg-type]
    with pytest.raises(CohortError, match="P001-S0 is synthetic"):
        plan(config_of(replace(known, labels=tmp_path / "labels.csv"), synthetic, tmp_path / "r"))


def test_the_generator_that_saw_test_patients_is_told(known: KnownCohort, synthetic: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_training_slides(model, ["P003-S0", "elsewhere"])
    found = plan(config_of(known, synthetic, tmp_path / "r", generator=str(model))).exposure
    assert found.patients == ("P003",)
    assert "the generator saw the test patients: 1 of the tested" in found.sentence
    write_training_slides(model, ["elsewhere"])
    found = plan(config_of(known, synthetic, tmp_path / "r", generator=str(model))).exposure
    assert "saw none of the test patients" in found.sentence
    (model / "training_slides.json").write_text('{"slides": 3}')
    with pytest.raises(RunError, match=r"training_slides\.json"):
        plan(config_of(known, synthetic, tmp_path / "r", generator=str(model)))
    with pytest.raises(RunError, match="--generator must be"):
        plan(config_of(known, synthetic, tmp_path / "r", generator=str(tmp_path / "none")))


def test_lists_of_slides_travel(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, first / "vae", second):
        folder.mkdir()
    write_training_slides(first, ["a"])
    write_training_slides(second, ["b"], [str(first / "vae")])
    assert read_training_slides(second).slides == ("a", "b")  # type: ignore[union-attr]
    assert read_training_slides(second).whole  # type: ignore[union-attr]
    write_training_slides(second, ["b"], [tmp_path / "first", "owner/name-on-the-hub"])
    assert not read_training_slides(second).whole  # type: ignore[union-attr]
    assert read_training_slides(tmp_path / "none") is None


def test_settings_out_of_range() -> None:
    for changes in ({"fractions": (0.0,)}, {"fractions": (1.0, 1.0)}, {"arms": ("synthetic",)}, {"noise": 0.0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            AugmentConfig(**changes)  # type: ignore[arg-type]


def test_the_bags_that_are_wanted(known: KnownCohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the training patients of the fraction, as many as are asked for, and no others."""
    path = tmp_path / "rows.csv"
    config = config_of(known, None, tmp_path / "run", fractions=(0.25,), amount=3, wanted=str(path))
    study, folds = real_folds(config)
    told = write_wanted(config, study, folds)
    rows = read_table(path)
    trained = {p for fold in folds[0.25] for p in fold.train}
    assert trained < set(known.truth)
    assert {row["source_patient"] for row in rows} == trained
    assert len(rows) == len({row["name"] for row in rows}) == 3 * len(trained)
    owners = {slide.name: slide.patient for slide in study.cohort.slides}
    for row in rows:
        assert owners[row["reference"]] == row["patient"] == row["source_patient"]
        assert study.task.classes.index(row["label"]) == known.truth[row["patient"]]
    assert f"--table {path}" in told
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in owners:
        (slides / f"{name}.svs").touch()  # looked up, not opened
    taken = read_asked(CohortConfig(table=str(path), slides=str(slides), bags_only=True))
    assert [row.name for row in taken if isinstance(row, Row)] == [row["name"] for row in rows]
    assert write_wanted(config, study, folds) == told
    path.write_text("mine")
    with pytest.raises(StudyError, match="must name a new file"):
        write_wanted(config, study, folds)


def test_the_demos_configs_fit_together() -> None:
    """The cohort reads the rows that the arms want, and the arms the bags that it writes, where the Makefile says."""
    arms = parse(["--config=configs/augment_demo.yaml"], AugmentConfig, "augment", "")
    bags = parse(["--config=configs/cohort_demo_augment.yaml"], CohortConfig, "cohort", "")
    assert arms.synthetic == bags.out
    assert bags.bags_only
    assert arms.labels is not None
    cohort = Path(arms.labels).parent
    assert bags.slides == str(cohort / "slides")
    makefile = (PROJECT_ROOT / "Makefile").read_text()
    for part in (
        f"--wanted {bags.table}",
        f"phantom_cohort --out {cohort}",
        f"--out {Path(str(arms.features)).parent}",
    ):
        assert part in makefile


@pytest.mark.parametrize(
    ("intervals", "said"),
    [
        ({"real": (0.01, 0.2), "real_twice": (0.02, 0.1)}, "is above real, real twice."),
        ({"real": (-0.2, -0.01), "real_twice": (-0.1, 0.1), "real_noise": (0.01, 0.2)},
         "is above real + feature noise alone, and below real."),
        ({"real": (-0.2, 0.1)}, "is above no other arm with real bags."),
    ],
)  # fmt: skip
def test_the_verdict_hides_no_harm(intervals: dict[str, tuple[float, float]], said: str) -> None:
    rows = [{"fraction": 0.1, "arm": arm, "real_synthetic_minus_this": {"low": low, "high": high}}
            for arm, (low, high) in intervals.items()]  # fmt: skip
    rows.append({"fraction": 0.1, "arm": "real_synthetic"})
    assert verdict({"arms": rows}) == f"At a fraction of 0.1, real + synthetic {said}"
