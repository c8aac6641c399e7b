"""Bad tables and bad features are refused by name, before anything is trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from mil.data.cohort import Cohort, match_features, read_labels
from mil.data.feature_files import find_features
from mil.data.tasks import Task, load_task
from mil.errors import CohortError, TaskError
from tests.support.known_cohort import KnownCohort, read_table, write_cohort, write_slide, write_table

Rows = list[dict[str, str]]


@pytest.fixture
def known(tmp_path: Path) -> KnownCohort:
    return write_cohort(tmp_path, 8)


@pytest.fixture(scope="module")
def hrd() -> Task:
    return load_task("hrd")


def looked_at(known: KnownCohort, hrd: Task, scales: tuple[str, ...] = ("20x", "5x"), skip: bool = False) -> Cohort:
    return match_features(read_labels(known.labels, hrd), find_features(known.features), scales, skip)


def test_a_good_cohort(known: KnownCohort, hrd: Task) -> None:
    cohort = looked_at(known, hrd)
    assert cohort.labels == known.truth
    assert len(cohort.slides) == 10
    assert cohort.widths == (5, 5)
    assert cohort.encoder.startswith("zoomldm up.1 100 null sha256:")
    assert cohort.left_out == ()


def changed(change: Callable[[Rows], object]) -> Callable[[Rows], Rows]:
    def apply(rows: Rows) -> Rows:
        change(rows)
        return rows

    return apply


BAD_TABLES = {
    "missing column": (lambda rows: [{k: r[k] for k in r if k != "hrd_score"} for r in rows], "lacks hrd_score"),
    "misspelt column": (lambda rows: [{k.replace("slide", "slid"): v for k, v in r.items()} for r in rows],
                        "slide .did you mean slid"),
    "two labels": (changed(lambda rows: rows[0].update(hrd_score="60")), "P000 have two"),
    "one class": (changed(lambda rows: [r.update(hrd_score="1") for r in rows]), "only: HR proficient"),
    "slide twice": (changed(lambda rows: rows.append(dict(rows[3]))), "P002-S0 come more than once"),
    "no patient": (changed(lambda rows: rows[2].update(patient="")), "line 4 lacks one"),
    "no rows": (lambda rows: [{**rows[0], "hrd_score": ""}], "only: none"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(known: KnownCohort, hrd: Task, name: str) -> None:
    change, told = BAD_TABLES[name]
    write_table(known.labels, change(read_table(known.labels)))  # type: ignore[arg-type]
    with pytest.raises(CohortError, match=told):
        read_labels(known.labels, hrd)


def test_a_label_that_is_no_number(known: KnownCohort, hrd: Task) -> None:
    rows = read_table(known.labels)
    rows[0]["hrd_score"] = "high"
    write_table(known.labels, rows)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="line 2"):
        read_labels(known.labels, hrd)


def test_a_table_that_is_not_there(tmp_path: Path, hrd: Task) -> None:
    with pytest.raises(CohortError, match="cannot be read"):
        read_labels(tmp_path / "none.csv", hrd)


def test_a_patient_of_two_sites(known: KnownCohort, hrd: Task) -> None:
    rows = read_table(known.labels)
    rows[0]["hospital"] = "Z"
    write_table(known.labels, rows)  # type: ignore[arg-type]
    with pytest.raises(CohortError, match="one site.*P000"):
        read_labels(known.labels, replace(hrd, columns=replace(hrd.columns, site="hospital")))


def test_slides_without_features(known: KnownCohort, hrd: Task) -> None:
    (known.features / "P001-S0.h5").unlink()
    with pytest.raises(CohortError, match="P001-S0.*--skip_missing"):
        looked_at(known, hrd)
    assert looked_at(known, hrd, skip=True).left_out == (("P001-S0", "no features file"),)


def test_names_with_an_ending_are_matched_and_said(known: KnownCohort, hrd: Task) -> None:
    rows = [{**r, "slide": r["slide"] + ".svs"} for r in read_table(known.labels)]
    write_table(known.labels, rows)  # type: ignore[arg-type]
    found = looked_at(known, hrd)
    assert ("P001-S0.svs", "P001-S0") in found.renamed
    assert {slide.name for slide in found.slides} == {row["slide"].removesuffix(".svs") for row in rows}
    rows[2]["slide"] = "p001-s0"  # case may mean something: named, never taken
    write_table(known.labels, rows)  # type: ignore[arg-type]
    with pytest.raises(CohortError, match="'p001-s0' is near 'P001-S0'"):
        looked_at(known, hrd)
    assert looked_at(known, hrd, skip=True).left_out == (("p001-s0", "no features file (near 'P001-S0')"),)


def test_rows_without_a_label_are_listed(known: KnownCohort, hrd: Task) -> None:
    rows = read_table(known.labels)
    rows[2]["hrd_score"], rows[3]["hrd_score"] = "", "#N/A"
    write_table(known.labels, rows)  # type: ignore[arg-type]
    assert looked_at(known, hrd).left_out == (
        ("P001-S0", "no label: hrd_score is empty"),
        ("P002-S0", "no label: hrd_score is '#N/A'"),
    )


def by_status(negative: str | None = None) -> Task:
    return Task("status", "status == pos", negative)


@pytest.mark.parametrize("negative", [None, "status != pos", "status == neg"])
def test_text_that_means_nothing_is_no_negative(tmp_path: Path, negative: str | None) -> None:
    cells = ["pos", "neg", "NA", "None", "-", "Unknown", "[Not Available]", "\u200b", "neg", "pos"]
    rows = [{"patient": f"p{i}", "slide": f"s{i}", "status": cell} for i, cell in enumerate(cells)]
    write_table(tmp_path / "t.csv", rows)  # type: ignore[arg-type]
    cohort = read_labels(tmp_path / "t.csv", by_status(negative))
    assert cohort.labels == {"p0": 1, "p1": 0, "p8": 0, "p9": 1}
    assert [name for name, _ in cohort.left_out] == [f"s{i}" for i in range(2, 8)]
    assert cohort.texts == ((1, "pos", 2), (0, "neg", 2))


def test_a_text_that_a_rule_names_is_a_label(tmp_path: Path) -> None:
    rows = [{"patient": f"p{i}", "slide": f"s{i}", "er": cell} for i, cell in enumerate("+-+-")]
    write_table(tmp_path / "t.csv", rows)  # type: ignore[arg-type]
    with pytest.raises(CohortError, match=r"2 left out.*er is '-'.*negative: status == -"):
        read_labels(tmp_path / "t.csv", Task("er", "er == +"))
    assert read_labels(tmp_path / "t.csv", Task("er", "er == +", "er == -")).labels == {
        f"p{i}": 1 - i % 2 for i in range(4)
    }


def test_another_case_than_the_rules_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"patient": "p", "slide": "s", "status": "Pos"}])
    with pytest.raises(TaskError, match=r"line 2 \(s\) has 'Pos'"):
        read_labels(tmp_path / "t.csv", by_status())


@pytest.mark.parametrize(
    ("column", "cell", "told"),
    [
        ("patient", "NA", "line 2 lacks one"),
        ("hospital", "n/a", "every slide needs a hospital"),
        ("hospital", "b", "site must be spelt in one way.*'b' and 'B'"),
        ("patient", "p001", "patient must be spelt in one way.*'p001' and 'P001'"),
        ("source_patient", "P001 ", ""),
        ("source_patient", "p001", "patient must be spelt in one way"),
    ],
)
def test_names_in_the_table_that_would_leak(tmp_path: Path, hrd: Task, column: str, cell: str, told: str) -> None:
    rows: list[dict[str, object]] = [
        {"patient": f"P00{i}", "slide": f"s{i}", "hrd_score": 60 * i, "hospital": "AB"[i], "source_patient": "NA"}
        for i in range(2)
    ]
    rows[0][column] = cell
    write_table(tmp_path / "t.csv", rows)
    task = replace(hrd, columns=replace(hrd.columns, site="hospital"))
    if told:
        with pytest.raises(CohortError, match=told):
            read_labels(tmp_path / "t.csv", task)
    else:
        assert [s.source for s in read_labels(tmp_path / "t.csv", task).slides if s.synthetic] == ["P001"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"weights_sha256": "cd" * 32}, "one encoder.*cdcdcd"), ({"encoder": "uni"}, "one encoder.*uni")],
)
def test_mixed_encoders(known: KnownCohort, hrd: Task, changes: dict[str, str], told: str) -> None:
    (known.features / "P001-S0.h5").unlink()
    write_slide(known.features, "P001-S0", True, True, 0, **changes)
    with pytest.raises(CohortError, match=told):
        looked_at(known, hrd)


def test_mixed_widths(tmp_path: Path, hrd: Task) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    rows = []
    for number, width in enumerate((4, 6)):
        with h5py.File(folder / f"s{number}.h5", "w") as file:
            file["features"] = np.zeros((3, width), np.float32)
        rows.append({"patient": f"p{number}", "slide": f"s{number}", "hrd_score": 50 * number})
    write_table(tmp_path / "t.csv", rows)
    with pytest.raises(CohortError, match="one width"):
        looked_at(KnownCohort(folder, tmp_path / "t.csv", {}), hrd, ("20x",))


def test_a_scale_that_is_not_in_the_file(known: KnownCohort, hrd: Task) -> None:
    with pytest.raises(CohortError, match="lacks 10x and holds 20x, 5x"):
        looked_at(known, hrd, ("20x", "10x"))


def test_empty_bags_are_left_out_by_name(known: KnownCohort, hrd: Task) -> None:
    with h5py.File(known.features / "P001-S0.h5", "r+") as file:
        for name in ("features", "coords", "parent", "valid"):
            old = file[f"20x/{name}"]
            shape, kind = (0, *old.shape[1:]), old.dtype  # type: ignore[union-attr]
            del file[f"20x/{name}"]
            file.create_dataset(f"20x/{name}", shape, kind)
    with h5py.File(known.features / "P002-S0.h5", "r+") as file:
        file["20x/valid"][:] = 0  # type: ignore[index]
    assert looked_at(known, hrd).left_out == (("P001-S0", "no tiles"), ("P002-S0", "no tile could be read"))
