"""Cells say a number, a text, or nothing; what may be two numbers is none until its column shows which."""

import pytest

from mil.data.values import decimal_sign, number, says_nothing


@pytest.mark.parametrize(
    "cell",
    ["", "NA", "N/A", "nan", "null", "None", "-", "\xa0", "#N/A", "#DIV/0!", "#NV", "<NA>", "'--", "not_known", "?"],
)
def test_nothing(cell: str) -> None:
    assert says_nothing(cell)


@pytest.mark.parametrize("cell", ["0", "+", "neg", "no", "x", "*", "✓", "none yet", "#1"])
def test_something(cell: str) -> None:
    assert not says_nothing(cell)


@pytest.mark.parametrize(
    ("cell", "sign", "value"),
    [
        ("60.5", None, 60.5),
        ("60,5", None, 60.5),
        ("0,123", None, 0.123),
        ("\u22123,5", None, -3.5),
        ("1.234,5", None, 1234.5),
        ("1,234,567", None, 1234567),
        ("1.234", None, 1.234),
        ("1.234", ",", 1234),
        ("1.234", "", None),
        ("1,234", None, None),
        ("1,234", ",", 1.234),
        ("1,234", ".", 1234),
        ("inf", None, None),
        ("1e999", None, None),
        ("1_000", None, None),
        (">42", None, None),
    ],
)
def test_numbers(cell: str, sign: str | None, value: float | None) -> None:
    assert number(cell, sign) == value


def test_what_a_column_shows() -> None:
    assert decimal_sign(["10", "60,5"], ",") == ","
    assert decimal_sign(["10", "60.5", "1,234"], ",") == "."
    assert decimal_sign(["60.5", "60,5"], ",") == ""
    assert decimal_sign(["10"], ";") is None
    assert decimal_sign(["1,234"], ",") is None
    assert decimal_sign(["1,234"], ";") == ","
    assert decimal_sign(["1.234"], ";") == ""
