"""Rows of a cohort: what is read, what is refused with which reason, and that nothing refused stops another row."""

from pathlib import Path

import numpy as np
import pytest

from engine.cohort.recipe import rows_of_recipe
from engine.cohort.run import rows_of
from engine.cohort.table import BadRow, Row, read_table
from engine.core.errors import ConfigError, EngineError
from engine.model.config import ModelConfig, tiny_config
from engine.slides.slide import open_slide
from engine.slides.tissue import TissueConfig, find_tissue
from tests.support.documents_place import MAGNIFICATIONS, write_slide
from tests.support.known_cohort_job import PX, job, write_rows

MODEL: ModelConfig = tiny_config(magnifications=MAGNIFICATIONS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for number in range(2):
        write_slide(folder / f"slides/s{number}.tiff", number, PX)
    np.save(folder / "cells.npy", np.random.default_rng(0).normal(size=(16, 4, 5)).astype(np.float32))
    return folder


GOOD = {"name": "good", "reference": "s0", "label": "a", "patient": "P1"}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"name": ""}, "missing_name"),
        ({"name": "../up"}, "bad_name"),
        ({"reference": "nowhere"}, "unknown_slide"),
        ({"reference": "s0", "region": "900,0,256,256"}, "region_outside"),
        ({"reference": "s0", "region": "0,-1,256,256"}, "region_outside"),
        ({"reference": "s0", "region": "0,0,wide"}, "bad_region"),
        ({"reference": "s0", "region": "0,0,200,300"}, "region_too_small"),
        ({"reference": "", "region": "0,0,256,256"}, "bad_region"),
        ({"embeddings": "cells.npy"}, "two_conditions"),
        ({"condition": "cdm"}, "two_conditions"),
        ({"reference": "", "condition": "magic"}, "bad_condition"),
        ({"reference": "", "embeddings": "none.npy"}, "no_embeddings"),
        ({"seed": "-1"}, "bad_seed"),
        ({"seed": "1.5"}, "bad_seed"),
        ({"height": "255"}, "bad_size"),
        ({"width": "wide"}, "bad_size"),
        ({"label": ""}, "missing_label"),
        ({"patient": ""}, "missing_patient"),
    ],
)
def test_a_bad_row_has_its_reason_and_stops_no_other(
    place: Path, tmp_path: Path, row: dict[str, str], code: str
) -> None:
    rows = [GOOD, GOOD | {"name": "other"} | row]
    good, bad = rows_of(job(place, tmp_path / "out", rows), MODEL)
    assert isinstance(good, Row)
    assert isinstance(bad, BadRow), bad
    assert bad.code == code, bad.message


def test_a_row_may_be_words(place: Path, tmp_path: Path) -> None:
    table = [
        {"name": "a", "text": "nests of tumour"},
        {"name": "b", "text": ""},
        {"name": "c", "text": "x", "reference": "s0"},
    ]
    first, second, third = rows_of(job(place, tmp_path / "out", table), MODEL)
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert isinstance(third, BadRow)
    assert (first.text, first.drawn_by, second.drawn_by, third.code) == (
        "nests of tumour", "text_prior", "cdm", "two_conditions",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "codes"),
    [
        (["a", "a", "b"], ["duplicate_name", "duplicate_name", None]),
        (["a", "A", "b"], ["same_output_name", "same_output_name", None]),
        (["a", "a.ome.tiff", "b"], ["same_output_name", "same_output_name", None]),
        (["ﬁne", "fine", "b"], ["same_output_name", "same_output_name", None]),
    ],
)
def test_rows_of_one_output_name_are_refused_all(
    place: Path, tmp_path: Path, names: list[str], codes: list[str | None]
) -> None:
    rows = rows_of(job(place, tmp_path / "out", [{"name": name, "reference": "s0"} for name in names]), MODEL)
    assert [row.code if isinstance(row, BadRow) else None for row in rows] == codes


def test_a_table_that_is_none_stops_the_job(place: Path, tmp_path: Path) -> None:
    for text, said in [
        ("", "must have the column name; .* has none"),
        ("name\n", "a header alone"),
        ("slide,seed\na,1\n", "must have the column name"),
        ("name,heigth\na,300\n", "did you mean height"),
        ("name,name\na,b\n", "twice"),
        ("name,seed\na,1,2\n", "no more cells"),
    ]:
        path = tmp_path / "t.csv"
        path.write_text(text)
        with pytest.raises(EngineError, match=said):
            read_table(job(place, tmp_path / "out", table=str(path)))


def test_what_rows_say_is_no_key(place: Path, tmp_path: Path) -> None:
    for key, value in (("reference", "x.png"), ("condition", "cdm")):
        with pytest.raises(ConfigError, match="Make them columns"):
            job(place, tmp_path, [GOOD], **{key: value})


def test_sizes_seeds_and_sources(place: Path, tmp_path: Path) -> None:
    rows = [
        {"name": "whole", "reference": "s0"},
        {"name": "part", "reference": str(place / "slides/s1.tiff"), "region": "10,20,512,300", "seed": "7"},
        {"name": "asked", "reference": "s1.tiff", "region": "0,0,512,512", "height": "300", "hospital": "north"},
        {"name": "dreamt"},
    ]
    whole, part, asked, dreamt = rows_of(job(place, tmp_path / "out", rows), MODEL)
    assert isinstance(whole, Row)
    assert isinstance(part, Row)
    assert isinstance(asked, Row)
    assert isinstance(dreamt, Row)
    assert [(r.height, r.width) for r in (whole, part, asked, dreamt)] == [
        (256, 320),
        (300, 512),
        (300, 512),
        (256, 320),
    ]
    assert (whole.source_slide, part.source_slide, dreamt.source_slide) == ("s0", "s1", "")
    assert part.seed == 7
    assert len({whole.seed, asked.seed, dreamt.seed}) == 3, "rows without a seed differ by their names"
    assert asked.more == (("hospital", "north"),)


def test_a_recipe_draws_regions_on_tissue_from_its_seed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("slide,patient,subtype,hospital\ns0,P0,ILC,north\ns1,P1,IDC,south\n")
    asked = {"recipe__variations": 3, "recipe__labels": str(tmp_path / "labels.csv"), "label": "subtype"}
    rows = rows_of(job(place, tmp_path / "out", **asked), MODEL)
    assert [row.name for row in rows] == [f"s{s}_v{v:03d}" for s in range(2) for v in range(3)]
    assert rows == rows_of(job(place, tmp_path / "out", **asked), MODEL)
    again = rows_of(job(place, tmp_path / "out", **asked, recipe__seed=1), MODEL)
    regions = [row.region for row in rows if isinstance(row, Row)]
    assert regions != [row.region for row in again if isinstance(row, Row)]
    assert len(set(regions[:3])) == 3
    assert rows[0].source_patient == "P0"  # type: ignore[union-attr]
    assert rows[5].label == "IDC"  # type: ignore[union-attr]
    assert dict(rows[5].more) == {"hospital": "south"}  # type: ignore[union-attr]
    config = TissueConfig(method="everything")
    with open_slide(place / "slides/s0.tiff") as slide:
        mask = find_tissue(slide, config)
        for box in regions[:3]:
            assert box is not None
            assert float(mask.share(np.array([box.x0]), np.array([box.y0]), 320, 256)[0]) >= 0.6


def test_a_slide_that_cannot_be_used_fails_alone(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "s0.tiff").symlink_to(place / "slides/s0.tiff")
    (folder / "broken.tiff").write_bytes(b"II*\0nothing")
    write_slide(folder / "small.tiff", 3, 300)
    labels = write_rows(tmp_path / "labels.csv", [{"slide": n, "patient": "P"} for n in ("s0", "broken", "small")])
    config = job(place, tmp_path / "out", slides=str(folder), recipe__labels=str(labels))
    codes = {row.name: row.code if isinstance(row, BadRow) else "" for row in rows_of(config, MODEL)}
    assert codes["s0_v000"] == ""
    assert codes["small_v000"] == "too_small"
    assert codes["broken_v000"]
    labels.write_text("slide,patient\ns0,P\n")
    codes = {row.name: row.code if isinstance(row, BadRow) else "" for row in rows_of_recipe(config, 0.5)}
    assert (codes["s0_v000"], codes["small_v000"], codes["broken_v000"]) == ("", "missing_label", "missing_label")
