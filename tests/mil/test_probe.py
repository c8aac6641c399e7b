"""Pictures of known classes are told apart, patients stay whole, and what does not fit is named before encoding."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mil import probe as probe_command
from mil.errors import CohortError, LeakageError, RunError, SplitError, StudyError, TaskError
from mil.fit.metrics import FIGURES
from mil.tiles.pictures import divide, read_pictures
from mil.tiles.probe import PROBES, judge
from mil.tiles.study import ProbeConfig, prepare, run
from mil.tiles.tasks import TASKS, TileTask, load_tile_task
from mil.tiles.vectors import tiles_of

COLOURS = {"rose": (200, 120, 160), "blue": (110, 100, 190), "pale": (235, 225, 235)}
TASK = "name: colours\nclasses: [rose, blue, pale]\nmpp: 0.5\nfolds: 2\npatient: '^(\\w+)-'\n"


def write_picture(path: Path, kind: str, seed: int, size: tuple[int, int] = (40, 40)) -> None:
    noise = np.random.default_rng(seed).normal(0, 12, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(COLOURS[kind]) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients with a picture of each class; the task beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "task.yaml").write_text(TASK)
    for number, kind in enumerate(COLOURS):
        for patient in range(6):
            write_picture(folder / "data" / kind / f"p{patient}-{number}.png", kind, 10 * number + patient)
    return folder


def argv_of(place: Path, out: Path, **keys: object) -> list[str]:
    keys = {"task": place / "task.yaml", "data": place / "data", "encoder": "texture", "out": out, "hidden": 8, **keys}
    return [f"--{name}={value}" for name, value in keys.items()]


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "probe"
    assert probe_command.main(argv_of(place, out)) == 0
    return out


def test_what_a_probe_leaves(finished: Path) -> None:
    results = json.loads((finished / "metrics.json").read_text())
    assert set(results["probes"]) == set(PROBES)
    for told in results["probes"].values():
        assert told["figures"]["auroc"]["value"] > 0.95
        assert np.sum(told["confusion"]) == 18
        assert set(told["per_class"]) == set(COLOURS)
    rows = list(csv.DictReader((finished / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 18
    for row in rows:
        assert sum(float(row[f"MLP: p({kind})"]) for kind in COLOURS) == pytest.approx(1, abs=1e-5)
        assert row["patient"] == Path(row["file"]).name.split("-")[0]
    assert "called rose" in (finished / "report.html").read_text()


def test_vectors_are_kept_and_another_probe_is_refused(
    finished: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.json").read_bytes()
    kept = next((finished / "vectors").glob("*.npy")).stat().st_mtime_ns
    assert probe_command.main(argv_of(place, finished)) == 0
    assert (finished / "metrics.json").read_bytes() == before
    assert next((finished / "vectors").glob("*.npy")).stat().st_mtime_ns == kept
    assert "encoded" not in capsys.readouterr().err
    assert probe_command.main(argv_of(place, finished, encoder="demo")) == 1
    assert "encoder was 'texture', now 'demo'" in capsys.readouterr().err


def test_the_plan_writes_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe_command.main([*argv_of(place, tmp_path / "out"), "--plan"]) == 0
    assert "18 pictures (6 rose, 6 blue, 6 pale) of 6 patients" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_classes_and_a_table_with_a_split(place: Path, tmp_path: Path) -> None:
    rows = ["Image Name,Kind,Partition"]
    for number in range(12):
        kind, part = ("rose", "blue")[number % 2], ("train", "train", "test")[number // 4]
        write_picture(tmp_path / "images" / f"{number}.png", kind, number)
        rows.append(f"{number}.png,{kind},{part}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    columns = "columns: {file: Image Name, label: Kind, patient: null, split: Partition}"
    (tmp_path / "task.yaml").write_text(f"name: two\nclasses: [rose, blue]\nmpp: 0.5\n{columns}\n")
    argv = argv_of(place, tmp_path / "out", task=tmp_path / "task.yaml", data=tmp_path / "table.csv")
    assert probe_command.main(argv) == 0
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (results["tested"], results["divisions"]) == (4, 1)
    assert results["probes"]["logistic regression"]["figures"]["auroc"]["value"] == 1


def test_patients_stay_whole(place: Path) -> None:
    task = load_tile_task(str(place / "task.yaml"))
    pictures = read_pictures(task, place / "data")
    patients = np.array([picture.patient for picture in pictures])
    divisions = divide(pictures, task, 0.3, 0)
    assert sorted(np.concatenate([d.test for d in divisions])) == list(range(18))
    for d in divisions:
        sides = [set(patients[rows]) for rows in (d.train, d.validation, d.test)]
        assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]


def test_folders_of_parts_and_a_second_folder(place: Path, tmp_path: Path) -> None:
    task = load_tile_task(str(place / "task.yaml"))
    for part, first in (("train", 0), ("val", 3), ("test", 6)):
        for kind in COLOURS:
            for patient in range(first, first + 3):
                write_picture(tmp_path / part / kind / f"p{patient}-x.png", kind, patient)
    (found,) = divide(read_pictures(task, tmp_path), task, 0.2, 0)
    assert [len(rows) for rows in (found.train, found.validation, found.test)] == [9, 9, 9]
    (other,) = divide(read_pictures(task, place / "data", tmp_path / "test"), task, 0.3, 0)
    assert len(other.test) == 9
    write_picture(tmp_path / "test" / "rose" / "p0-y.png", "rose", 0)
    with pytest.raises(LeakageError, match=r"p0 is in t.*p0-"):
        divide(read_pictures(task, tmp_path), task, 0.2, 0)


def test_pictures_are_brought_to_the_encoders_pixels(tmp_path: Path) -> None:
    picture = np.zeros((300, 700, 3), np.uint8)
    picture[:, 350:] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    coords, images = tiles_of(tmp_path / "a.png", 0.5, 0.5)
    assert images.shape == (6, 3, 256, 256)
    assert coords.tolist() == [[0, 0], [222, 0], [444, 0], [0, 44], [222, 44], [444, 44]]
    np.testing.assert_array_equal(images[1], picture[:256, 222:478].transpose(2, 0, 1))
    coords, images = tiles_of(tmp_path / "a.png", 0.25, 0.5)  # 150 px high at 0.5: enlarged to one tile's height
    assert len(images) == 3
    assert images[0].max() == 0
    assert images[2].min() == 200


def test_the_probes_are_scored_as_they_are() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    vectors = rng.normal(size=(120, 6)).astype(np.float32)
    vectors[:, 0] += 4 * labels
    rows = np.arange(120)
    division = type("D", (), {"train": rows[:60], "validation": rows[60:80], "test": rows[80:]})
    for name in PROBES:
        found, chosen = judge(name, vectors, labels, rows.astype(str), division, 0, 8)  # type: ignore[arg-type]
        assert FIGURES["auroc"](found, np.ones((1, 40)))[0] > 0.85
        assert chosen["temperature"] > 0


def test_what_does_not_fit(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = load_tile_task(str(place / "task.yaml"))
    write_picture(tmp_path / "odd" / "green" / "p0-1.png", "rose", 0)
    with pytest.raises(CohortError, match="holds green"):
        read_pictures(task, tmp_path / "odd")
    write_picture(tmp_path / "few" / "rose" / "p0-1.png", "rose", 0)
    with pytest.raises(CohortError, match="it lacks blue, pale"):
        read_pictures(task, tmp_path / "few")
    (tmp_path / "few" / "rose" / "nobody.png").write_bytes(b"")
    with pytest.raises(CohortError, match="say in its name whose it is"):
        read_pictures(task, tmp_path / "few")
    with pytest.raises(CohortError, match="there is no"):
        read_pictures(task, tmp_path / "none")
    with pytest.raises(StudyError, match="--data FOLDER"):
        prepare(ProbeConfig(task=str(place / "task.yaml")))
    for row, told in (("a.png,green", "one of rose, blue, pale"), ("a.png,rose", "must be a picture beside")):
        (tmp_path / "t.csv").write_text(f"file,label\n{row}\n")
        with pytest.raises(CohortError, match=told):
            read_pictures(task, tmp_path / "t.csv")
    for kind in COLOURS:
        for patient in range(2 if kind == "pale" else 6):
            write_picture(tmp_path / "one" / kind / f"p{patient}-{kind}.png", kind, patient)
    with pytest.raises(SplitError, match="pale has 2"):
        divide(read_pictures(task, tmp_path / "one"), task, 0.2, 0)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(CohortError, match=r"broken\.png must be a picture"):
        tiles_of(broken, 0.5, 0.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    assert probe_command.main(argv_of(place, tmp_path / "full")) == 1
    assert "letter.txt" in capsys.readouterr().err


def test_a_damaged_record_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probe.json").write_text("{}")
    config = ProbeConfig(str(place / "task.yaml"), str(place / "data"), encoder="texture", out=str(tmp_path / "out"))
    with pytest.raises(RunError, match="damaged"):
        run(prepare(config), print)


@pytest.mark.parametrize("name", sorted(path.stem for path in TASKS.glob("*.yaml")))
def test_the_tasks_that_ship(name: str) -> None:
    assert load_tile_task(name).name == name


def test_names_of_files_say_patients() -> None:
    for name, file, patient in (
        ("breakhis", "SOB_M_DC-14-2523-100-001.png", "14-2523"),
        ("breakhis", "SOB_B_TA-14-19854C-100-021.png", "14-19854C"),
        ("bracs", "BRACS_010_PB_32.png", "BRACS_010"),
        ("bracs", "BRACS_1003728_ADH_1.png", "BRACS_1003728"),
    ):
        found = re.search(load_tile_task(name).patient or "", file)
        assert found is not None
        assert found[1] == patient


@pytest.mark.parametrize(
    ("keys", "told"),
    [({"classes": ("a",)}, "two or more"), ({"mpp": 0.0}, "mpp > 0"), ({"patient": "x"}, "a group in brackets"),
     ({"folders": {"c": ("d",)}}, "c are none"), ({"metrics": ("f1",)}, "f1")],
)  # fmt: skip
def test_tasks_out_of_range(keys: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TileTask(**{"name": "t", "classes": ("a", "b"), "mpp": 0.5, **keys})  # type: ignore[arg-type]


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(TaskError, match="Did you mean bach"):
        load_tile_task("bahc")
