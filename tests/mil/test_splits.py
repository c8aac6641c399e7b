"""Patients are never on both sides, classes and sites are kept, and a user's split is checked like our own."""

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest

from mil.data.cohort import Cohort, Slide
from mil.data.splits import PARTS, Fold, check_division, divide, division_csv, read_division
from mil.data.tasks import SplitScheme
from mil.errors import LeakageError, SplitError

SCHEME = SplitScheme(folds=4, repeats=2)


def cohort_of(patients: int = 40, sites: int = 8) -> Cohort:
    """Every third patient is positive; every fifth has two slides."""
    slides = []
    for n in range(patients):
        parts = range(2 if n % 5 == 0 else 1)
        slides += [Slide(f"p{n}-{part}", f"p{n}", int(n % 3 == 0), site=f"site{n % sites}") for part in parts]
    return Cohort(tuple(slides))


def with_synthetic(cohort: Cohort, patient: str, source: str | None, label: int) -> Cohort:
    slide = Slide("made", patient, label, site="site0", source=source, synthetic=True)
    return replace(cohort, slides=(*cohort.slides, slide))


def test_every_patient_is_tested_once_per_repeat() -> None:
    cohort = cohort_of()
    folds = divide(cohort, SCHEME, seed=0)
    assert len(folds) == 8
    for repeat in range(2):
        own = [f for f in folds if f.repeat == repeat]
        assert sorted(p for f in own for p in f.test) == sorted(cohort.labels)
    for fold in folds:
        assert fold.train | fold.validation | fold.test == set(cohort.labels)
        for part in PARTS:
            labels = [cohort.labels[p] for p in fold.part(part)]
            assert abs(sum(labels) - len(labels) * 14 / 40) <= 1.5  # stratified
    assert {f.test for f in folds if f.repeat == 0} != {f.test for f in folds if f.repeat == 1}


def test_the_split_follows_from_the_seed() -> None:
    assert divide(cohort_of(), SCHEME, 3) == divide(cohort_of(), SCHEME, 3)
    assert divide(cohort_of(), SCHEME, 3) != divide(cohort_of(), SCHEME, 4)


def test_sites_stay_together() -> None:
    cohort = cohort_of()
    sites = {s.patient: s.site for s in cohort.slides}
    for fold in divide(cohort, replace(SCHEME, scheme="site", validation=0.3), seed=0):
        parts = [{sites[p] for p in fold.part(part)} for part in PARTS]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


@pytest.mark.parametrize(
    ("cohort", "told"), [(cohort_of(9), "at least 5 patients"), (cohort_of(40, 3), "at least 5 sites")]
)
def test_too_few(cohort: Cohort, told: str) -> None:
    with pytest.raises(SplitError, match=told):
        divide(cohort, replace(SCHEME, scheme="site"), seed=0)


def test_synthetic_slides_follow_their_source_and_are_only_trained_on() -> None:
    cohort = with_synthetic(cohort_of(), "m1", "p7", 0)
    for fold in divide(cohort, SCHEME, seed=0):
        sides = {part for part in PARTS if fold.part(part) & {"m1", "p7"}}
        assert len(sides) == 1
        names = {part: {s.name for s in fold.slides(cohort, part)} for part in PARTS}
        assert "made" not in names["validation"] | names["test"]
        assert ("made" in names["train"]) == ("p7" in fold.train)


def test_a_synthetic_slide_of_nobody_fails_the_run() -> None:
    with pytest.raises(LeakageError, match="made does not"):
        divide(with_synthetic(cohort_of(), "m1", None, 0), SCHEME, seed=0)


def test_leakage_fails_the_run() -> None:
    cohort = with_synthetic(cohort_of(), "m1", "p7", 0)
    good = divide(cohort, SCHEME, seed=0)[0]
    check_division(cohort, [good], SCHEME)
    someone = min(good.test - {"p7", "m1"})
    twice = replace(good, train=good.train | {someone})
    with pytest.raises(LeakageError, match=f"patient must be on one side.*{someone} is in train"):
        check_division(cohort, [twice], SCHEME)
    rest = [replace(good, **{part: good.part(part) - {"p7", "m1"} for part in PARTS})]
    apart = replace(rest[0], train=rest[0].train | {"m1"}, test=rest[0].test | {"p7"})
    with pytest.raises(LeakageError, match="source patient"):
        check_division(cohort, [apart], SCHEME)
    with pytest.raises(LeakageError, match="a site must"):
        check_division(cohort, [good], replace(SCHEME, scheme="site"))


def test_a_part_of_one_class_is_refused() -> None:
    cohort = cohort_of()
    good = divide(cohort, SCHEME, seed=0)[0]
    negatives = frozenset(p for p in good.test if cohort.labels[p] == 0)
    with pytest.raises(SplitError, match="test of repeat0_fold0 has only one"):
        check_division(cohort, [replace(good, test=negatives)], SCHEME)


def test_our_own_file_comes_back(tmp_path: Path) -> None:
    cohort = cohort_of()
    folds = divide(cohort, SCHEME, seed=0)
    path = tmp_path / "splits.csv"
    path.write_text(division_csv(folds))
    assert read_division(path, cohort, SCHEME) == folds


def clams(folder: Path, folds: list[Fold], cohort: Cohort) -> None:
    """As CLAM writes them: an index column without a name, columns of slide ids of different lengths."""
    for k, fold in enumerate(folds):
        columns = [[s.name for s in fold.slides(cohort, part)] for part in PARTS]
        rows = [",train,val,test"]
        cells = zip_longest(*columns, fillvalue="")
        rows += [",".join([str(i), *row]) for i, row in enumerate(cells)]
        (folder / f"splits_{k}.csv").write_text("\n".join(rows) + "\n")
        (folder / f"splits_{k}_bool.csv").write_text("ignored")


def test_clams_files(tmp_path: Path) -> None:
    cohort = cohort_of()
    folds = list(divide(cohort, replace(SCHEME, repeats=1), seed=0))
    clams(tmp_path, folds, cohort)
    assert list(read_division(tmp_path, cohort, SCHEME)) == folds
    clams(tmp_path, [folds[0], replace(folds[0], number=1)], cohort)
    again = read_division(tmp_path / "splits_0.csv", cohort, SCHEME)
    assert [f.test for f in again] == [folds[0].test]


def test_random_splits_that_test_a_patient_again_are_repeats(tmp_path: Path) -> None:
    cohort = cohort_of()
    folds = list(divide(cohort, replace(SCHEME, repeats=1), seed=0))[:1] * 2
    clams(tmp_path, folds, cohort)
    assert [(f.repeat, f.number) for f in read_division(tmp_path, cohort, SCHEME)] == [(0, 0), (1, 0)]


@pytest.mark.parametrize(
    ("content", "told"),
    [("a,b\n1,2\n", "must have the columns"), (",train,val,test\n0,nobody,,\n", "such as nobody"),
     ("repeat,fold,patient,part\n0,0,p1,tests\n", "one of train")],
)  # fmt: skip
def test_files_that_are_no_split(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "splits_0.csv"
    path.write_text(content)
    with pytest.raises(SplitError, match=told):
        read_division(path, cohort_of(), SCHEME)


def test_slides_of_one_patient_in_two_of_clams_columns(tmp_path: Path) -> None:
    path = tmp_path / "splits_0.csv"
    path.write_text(",train,val,test\n0,p0-0,p1-0,p0-1\n1,p2-0,p3-0,p4-0\n")
    with pytest.raises(LeakageError, match="p0 is in train"):
        read_division(path, cohort_of(), SCHEME)
