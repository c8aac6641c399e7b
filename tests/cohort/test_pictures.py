"""Cohorts of pictures in this process: bytes of the row alone, failures, resume, labels, the way to a classifier."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from engine import generate_cohort
from engine.cohort import picture
from engine.cohort.output import COLUMNS, Record
from engine.cohort.run import make_alone, make_cohort
from engine.core.errors import CanvasError, CanvasMismatchError
from engine.core.progress import Progress
from engine.generation.run import load_model, prepare, run, stored_config
from engine.generation.session import local_backend
from engine.images.ome_zarr import Image
from engine.sampling.config import RunConfig
from engine.slides.slide import open_slide
from mil import train
from tests.support.documents_place import MAGNIFICATIONS, write_slide
from tests.support.known_cohort_job import SHARED, job, read_csv, write_inputs, write_rows
from tests.support.known_study import QUICK
from tests.support.tiny_run import store_model

REGION = "64,0,320,256"
ROWS: list[dict[str, object]] = [
    {"name": "after_slide", "reference": "s0", "region": REGION, "seed": 3, "subtype": "ILC", "patient": "",
     "source_patient": "P0"},
    {"name": "after_vectors", "embeddings": "{cells}", "subtype": "IDC", "source_patient": "P1"},
    {"name": "dreamt", "height": 256, "width": 256, "subtype": "IDC", "source_patient": "P1"},
    {"name": "lost", "reference": "nowhere", "subtype": "IDC", "source_patient": "P1"},
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_inputs(folder)
    return folder


def rows(inputs: Path) -> list[dict[str, object]]:
    return [{k: str(v).replace("{cells}", str(inputs / "cells.npy")) for k, v in row.items()} for row in ROWS]


def make(inputs: Path, out: Path, **more: object) -> list[Record]:
    return make_cohort(job(inputs, out, rows(inputs), **more), make_alone, Progress())


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    make(inputs, out)
    return out


def pixels(path: Path) -> np.ndarray:
    image = Image.open(path)
    return image.read(0, image.height)


def test_rows_done_and_failed(made: Path) -> None:
    found = {row["name"]: row for row in read_csv(made / "cohort.csv")}
    assert {name: (row["status"], row["reason"]) for name, row in found.items()} == {
        "after_slide": ("done", ""), "after_vectors": ("done", ""), "dreamt": ("done", ""),
        "lost": ("failed", "unknown_slide"),
    }  # fmt: skip
    assert tuple(found["lost"]) == COLUMNS
    assert found["after_slide"]["source_slide"] == "s0"
    assert found["after_slide"]["patient"] == "P0", "inherited"
    page = (made / "report.html").read_text()
    assert "unknown_slide" in page
    assert page.count("data:image/jpeg") == 4, "three pictures and one reference"


def test_every_file_says_where_it_comes_from(made: Path) -> None:
    image = Image.open(made / "runs/after_slide/image.ome.zarr")
    wanted = {"synthetic": True, "source_patient": "P0", "source_slide": "s0"}
    assert wanted.items() <= image.provenance.items()
    with tifffile.TiffFile(made / "pictures/after_slide.ome.tiff") as tiff:
        assert all(f'"{key}"' in (tiff.ome_metadata or "") or key in (tiff.ome_metadata or "") for key in wanted)
    with Pillow.open(made / "runs/after_slide/preview.png") as preview:
        assert wanted.items() <= json.loads(preview.info["provenance"]).items()
    with open_slide(made / "pictures/after_slide.ome.tiff") as slide:
        assert (slide.name, slide.resolution.mpp, slide.width, slide.height) == ("after_slide", 0.5, 320, 256)


def test_a_picture_has_the_bytes_of_its_row_alone(inputs: Path, made: Path, tmp_path: Path) -> None:
    """Drawn by the run command's own order, after the region as a picture of its own."""
    with open_slide(inputs / "slides/s0.tiff") as slide:
        Pillow.fromarray(slide.read(64, 0, 320, 256, 0.5).pixels).save(tmp_path / "region.png")
    stored = stored_config(made / "runs/after_slide")
    keys = {name: getattr(stored, name) for name in ("model", "canvas", "sampling", "decode", "guidance", "ray")}
    output = type(stored.output)(str(tmp_path / "alone"), ())
    alone = RunConfig(**keys, output=output, reference=str(tmp_path / "region.png"))
    run(prepare(alone), local_backend, Progress())
    assert np.array_equal(pixels(tmp_path / "alone/image.ome.zarr"), pixels(made / "runs/after_slide/image.ome.zarr"))
    with open_slide(made / "pictures/after_slide.ome.tiff") as slide:
        drawn = slide.read(0, 0, 320, 256, 0.5).pixels.transpose(2, 0, 1)
    assert np.array_equal(drawn, pixels(tmp_path / "alone/image.ome.zarr"))


class Killed(BaseException):
    """What ends a process at once."""


def test_a_killed_job_goes_on_to_the_same_bytes(
    inputs: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    real = picture.write_export

    def dies(path: Path, *more: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise Killed
        real(path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(picture, "write_export", dies)
    with pytest.raises(Killed):
        make(inputs, tmp_path / "out")
    monkeypatch.setattr(picture, "write_export", real)
    before = {row["name"]: row["status"] for row in read_csv(tmp_path / "out/cohort.csv")}
    assert before == {"after_slide": "done", "after_vectors": "pending", "dreamt": "pending", "lost": "failed"}
    stamp = (tmp_path / "out/pictures/after_slide.ome.tiff").stat().st_mtime_ns
    make(inputs, tmp_path / "out")
    assert (tmp_path / "out/pictures/after_slide.ome.tiff").stat().st_mtime_ns == stamp, "what is done is kept"
    for name in ("after_slide", "after_vectors", "dreamt"):
        file = f"pictures/{name}.ome.tiff"
        assert (tmp_path / "out" / file).read_bytes() == (made / file).read_bytes(), name
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_finished_job_loads_no_network(
    inputs: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path / "out")
    monkeypatch.setattr("engine.generation.run.load_model", lambda config: pytest.fail("a network was loaded"))
    records = make(inputs, tmp_path / "out")
    assert [record.status for record in records] == ["done", "done", "done", "failed"]


def test_the_model_is_loaded_once(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[RunConfig] = []
    monkeypatch.setattr(
        "engine.generation.run.load_model", lambda config: (loads.append(config), load_model(config))[1]
    )
    make(inputs, tmp_path / "out")
    assert len(loads) == 1


def test_only_failed_rows_are_tried_again(inputs: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    shutil.rmtree(out / "runs/dreamt")
    (out / "pictures/dreamt.ome.tiff").unlink()  # to do, but it has not failed
    mended = [row | ({"reference": "s1"} if row["name"] == "lost" else {}) for row in rows(inputs)]
    records = make_cohort(job(inputs, out, mended), make_alone, Progress(), only_failed=True)
    assert {r.name: r.status for r in records} == {
        "after_slide": "done", "after_vectors": "done", "dreamt": "pending", "lost": "done",
    }  # fmt: skip


def test_a_row_that_changed_is_not_made_over_its_picture(inputs: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    before = (out / "pictures/after_slide.ome.tiff").read_bytes()
    changed = [row | ({"seed": "4"} if row["name"] == "after_slide" else {"subtype": "ILC"}) for row in rows(inputs)]
    records = {r.name: r for r in make_cohort(job(inputs, out, changed), make_alone, Progress())}
    assert (records["after_slide"].status, records["after_slide"].reason) == ("failed", "row_changed")
    assert (out / "pictures/after_slide.ome.tiff").read_bytes() == before
    labels = {row["slide"]: row["subtype"] for row in read_csv(out / "labels.csv")}
    assert labels == {"after_vectors": "ILC", "dreamt": "ILC"}, "labels may change"


def test_other_settings_are_refused(inputs: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "out")
    with pytest.raises(CanvasMismatchError, match=r"sampling\.stride was 500, now 250"):
        make(inputs, tmp_path / "out", sampling__stride=250)


def test_a_full_disk_stops_the_job_and_loses_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *more: object) -> None:
        raise CanvasError(f"{path}: the disk is full") from OSError(28, "No space left on device")

    monkeypatch.setattr(picture, "write_export", full)
    with pytest.raises(CanvasError, match="disk is full"):
        make(inputs, tmp_path / "out")
    assert {row["status"] for row in read_csv(tmp_path / "out/cohort.csv")} == {"pending", "failed"}


def test_a_damaged_run_fails_alone(inputs: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (out / "pictures/dreamt.ome.tiff").unlink()
    (out / "runs/dreamt/state.json").write_text("{")
    records = {r.name: r for r in make(inputs, out)}
    assert records["dreamt"].reason == "damaged_run"
    assert records["after_slide"].status == "done"


def test_a_model_without_cdm_and_prior_draws_the_others(inputs: Path, tmp_path: Path) -> None:
    source = str(store_model(tmp_path, magnifications=MAGNIFICATIONS))
    table = [row for row in rows(inputs) if row["name"] in ("dreamt", "after_vectors")]
    table.append({"name": "words", "text": "nests of tumour", "source_patient": "P0"})
    records = make_cohort(job(inputs, tmp_path / "out", table, model__source=source), make_alone, Progress())
    assert {r.name: r.reason for r in records} == {"after_vectors": "", "dreamt": "no_cdm", "words": "no_text_prior"}


def test_pictures_alone_can_be_kept(inputs: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(inputs, out, keep="pictures")
    file = "pictures/after_slide.ome.tiff"
    assert (out / file).read_bytes() == (made / file).read_bytes()
    left = {path.name for path in (out / "runs/after_slide").iterdir()}
    assert left == {"report.json", "config.yaml", "preview.png"}
    assert [r.status for r in make(inputs, out, keep="pictures")] == ["done", "done", "done", "failed"]


def flags(inputs: Path, out: Path) -> list[str]:
    keys = SHARED | {"model.source": inputs / "model", "slides": inputs / "slides", "out": out}
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]


def test_the_command(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = job(inputs, tmp_path / "out", rows(inputs)).table
    argv = [*flags(inputs, tmp_path / "out"), f"--table={table}"]
    assert generate_cohort.main([*argv, "--plan"]) == 3
    planned = capsys.readouterr().out
    assert "4: 3 to make, 1 that cannot be made" in planned
    assert "unknown_slide" in planned
    assert not (tmp_path / "out/cohort.csv").exists()
    assert generate_cohort.main(argv) == 3
    assert "3 of 4 pictures" in capsys.readouterr().out
    write_rows(Path(str(table)), [row for row in rows(inputs) if row["name"] != "lost"])
    assert generate_cohort.main(argv) == 0


def test_from_a_cohort_to_features_and_a_classifier(inputs: Path, tmp_path: Path) -> None:
    """Variations of labelled slides beside the real ones: extracted as they are, learnt from, tested on the real."""
    folder, varied = tmp_path / "slides", tmp_path / "varied"
    real = [{"slide": f"r{n}", "patient": f"P{n}", "subtype": ("ILC", "IDC")[n % 2]} for n in range(20)]
    varied.mkdir()
    for number, row in enumerate(real):
        write_slide(folder / f"{row['slide']}.tiff", number, 320)
    for row in real[:4]:
        (varied / f"{row['slide']}.tiff").symlink_to(folder / f"{row['slide']}.tiff")
    write_rows(tmp_path / "real.csv", real)
    config = job(inputs, tmp_path / "out", slides=str(varied), recipe__labels=str(tmp_path / "real.csv"))
    assert [r.status for r in make_cohort(config, make_alone, Progress())] == ["done"] * 4
    for picture_file in (tmp_path / "out/pictures").iterdir():
        (folder / picture_file.name).symlink_to(picture_file)
    argv = [f"--slides={folder}", f"--out={tmp_path / 'f'}", "--encoders=[texture]", "--ray.enabled=false",
            "--finder.method=everything", f"--model.source={inputs / 'model'}"]  # fmt: skip
    assert import_module("engine.extract_features").main(argv) == 0
    drawn = read_csv(tmp_path / "out/labels.csv")
    assert {(row["slide"], row["patient"], row["source_patient"], row["subtype"]) for row in drawn} == {
        (f"{row['slide']}_v000", row["patient"], row["patient"], row["subtype"]) for row in real[:4]
    }
    write_rows(tmp_path / "all.csv", [*real, *drawn])
    study = [f"--features={tmp_path / 'f/features'}", f"--labels={tmp_path / 'all.csv'}", "--task=subtyping"]
    assert train.main([*study, f"--output.folder={tmp_path / 'study'}", *QUICK, "--training.epochs=2"]) == 0
    predictions = [row for path in (tmp_path / "study").rglob("predictions.csv") for row in read_csv(path)]
    assert {row["patient"] for row in predictions} == {row["patient"] for row in real}
