"""Names that differ in writing only are one name where no other can be meant."""

import unicodedata

import pytest

from mil.data.names import alike, match_names, near_names, similar_names

COMPOSED = "M\u00fcller-1"


@pytest.mark.parametrize(
    ("wanted", "known"),
    [
        (COMPOSED, unicodedata.normalize("NFD", COMPOSED)),
        ("s1.svs", "s1"),
        ("s1", "s1.ome.tiff"),
        ("s1.h5", "s1"),
        ("1001.0", "1001"),
        ("7", "0007"),
        (" s1\u200b", "s1"),
    ],
)
def test_the_same(wanted: str, known: str) -> None:
    assert match_names([wanted], ["other", known]) == {wanted: known}


def test_what_two_names_could_be_is_neither() -> None:
    assert match_names(["7"], ["07", "007"]) == {}
    assert match_names(["7", "7.0"], ["007"]) == {}
    assert match_names(["7", "07"], ["7", "07"]) == {"7": "7", "07": "07"}
    assert match_names(["7", "07"], ["7"]) == {"7": "7"}
    assert match_names(["a.b"], ["a"]) == {}  # .b is no ending of a slide


def test_what_is_near_is_named() -> None:
    assert "'S1' is near 's1'" in near_names(["S1"], ["s1", "t"])
    assert "'a\u20131' is near 'a-1'" in near_names(["a\u20131"], ["a-1"])
    assert "'7' is near '07' and '007'" in near_names(["7"], ["07", "007"])
    assert "spreadsheet shortened" in near_names(["1.2E+12"], ["1200000000017"])
    assert near_names(["x"], ["abc"]) == ""
    assert similar_names(["S1", "z"], ["s1"]) == {"S1": " (near 's1')"}
    assert alike(["p1", "p2", "P1", "p1"]) == [("p1", "P1")]
