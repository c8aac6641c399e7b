"""Tasks are YAML: rules are read strictly, and a name that is not known is answered with the nearest."""

import re
from pathlib import Path

import pytest

from mil.data.tasks import Rule, load_task
from mil.errors import TaskError


@pytest.mark.parametrize(
    ("rule", "yes", "no"),
    [
        ("hrd_score >= 42", "42", "41.9"),
        ("score < 3", "2.5", "3"),
        ("subtype == ILC", "ILC", "IDC"),
        ("subtype != 'ILC'", "IDC", "ILC"),
        ("grade == 3", "3.0", "2"),
        ("er status == positive", "positive", "negative"),
    ],
)
def test_rules(rule: str, yes: str, no: str) -> None:
    found = Rule.read(rule)
    assert found.holds(yes, "here")
    assert not found.holds(no, "here")


@pytest.mark.parametrize("text", ["hrd_score", ">= 42", "hrd_score >= high", "hrd_score => "])
def test_a_rule_that_cannot_be_read(text: str) -> None:
    with pytest.raises(TaskError):
        Rule.read(text)


def test_a_cell_that_is_no_number_is_named() -> None:
    with pytest.raises(TaskError, match="line 7.*'high'"):
        Rule.read("hrd_score >= 42").holds("high", "line 7")


def test_the_tasks_that_ship() -> None:
    hrd, subtyping = load_task("hrd"), load_task("subtyping")
    assert [hrd.label({"hrd_score": v}, "") for v in ("42", "41", " ")] == [1, 0, None]
    assert [subtyping.label({"subtype": v}, "") for v in ("ILC", "IDC", "mixed", "")] == [1, 0, None, None]


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(TaskError, match="Did you mean subtyping"):
        load_task("subtype")


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "grade.yaml"
    path.write_text("name: grade\npositive: grade == 3\ncolumns: {patient: case_id, slide: slide_id, site: centre}\n")
    assert load_task(str(path)).columns.site == "centre"
    path.write_text("name: grade\npositiv: grade == 3\n")
    with pytest.raises(TaskError, match="did you mean positive"):
        load_task(str(path))


@pytest.mark.parametrize(
    ("extra", "told"),
    [("split: {scheme: site}", "columns.site"), ("split: {folds: 1}", "split.folds"), ("metrics: [f1]", "f1")],
)
def test_settings_out_of_range(tmp_path: Path, extra: str, told: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(f"name: t\npositive: a == 1\n{extra}\n")
    with pytest.raises(TaskError, match=re.escape(told)):
        load_task(str(path))
