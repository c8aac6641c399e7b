"""Lines for a job log: the first step, the last one, and signs of life when steps are long."""

import io

import pytest

from engine.core import progress
from engine.core.progress import Progress


def lines_of(every_s: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines of a count of 0, 0, 1, 2 of 2 when a line is due after so many seconds."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", every_s)
    out = io.StringIO()
    shown = Progress(out)
    for done in (0, 0, 1, 2):
        shown.step("slides", done, 2)
    return [line.split(",")[0] for line in out.getvalue().splitlines()]


def test_short_steps_say_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(3600.0, monkeypatch)[-1] == "slides: step 2/2"
    assert "slides: step 0/2" not in lines_of(3600.0, monkeypatch)


def test_one_long_step_shows_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines_of(0.0, monkeypatch)
    assert said[0] == "slides: step 0/2"
    assert said[-1] == "slides: step 2/2"
