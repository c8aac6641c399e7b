"""How commands end: what is said, which code, and what passes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from engine.core import exits
from engine.core.cli import PROJECT_ROOT
from engine.core.errors import EngineError, SlideError
from engine.core.exits import DONE, FAILED, PARTLY, SIGTERM_EXIT, exit_code
from engine.slides.boundary import one_slide


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (lambda: DONE, 0, ""),
        (lambda: PARTLY, 3, ""),
        (lambda: raising(EngineError("it must be so; it is not. Mend it.")), FAILED, "a: it must be so; it is not."),
        (lambda: raising(KeyboardInterrupt()), 130, "Interrupted. Kept."),
        (lambda: os.kill(os.getpid(), signal.SIGTERM) or signal.pause() or DONE, SIGTERM_EXIT, "Interrupted. Kept."),
    ],
)
def test_what_is_said_and_which_code(work, code: int, said: str) -> None:
    lines: list[str] = []
    assert exit_code("a", work, lambda: "Kept.", lines.append) == code
    assert "".join(lines).startswith(said)
    assert bool(lines) == bool(said)


def test_mistakes_and_exits_of_others_pass() -> None:
    with pytest.raises(ValueError, match="a mistake"):
        exit_code("a", lambda: raising(ValueError("a mistake")), lambda: "Kept.")
    with pytest.raises(SystemExit) as stop:
        exit_code("a", lambda: raising(SystemExit(2)), lambda: "Kept.")
    assert stop.value.code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_found_behind_what_a_library_makes_of_it(number: signal.Signals) -> None:
    """A condition's wait that is interrupted releases a lock that it does not hold."""

    def work() -> int:
        try:
            signal.raise_signal(number)
        finally:
            raise RuntimeError("release unlocked lock")

    lines: list[str] = []
    assert exit_code("a", work, lambda: "Kept.", lines.append) == 128 + number
    assert lines == ["Interrupted. Kept."]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_is_swallowed_comes_again(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setattr(exits, "AGAIN_S", 0.01)

    def work() -> int:
        with contextlib.suppress(BaseException):  # as a destructor or a callback does
            signal.raise_signal(number)
        while True:
            time.sleep(0.01)

    lines: list[str] = []
    assert exit_code("a", work, lambda: "Kept.", lines.append) == 128 + number
    assert lines == ["Interrupted. Kept."]


def test_an_interruption_in_a_callback_is_not_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python says of what a weak reference's callback raises that it is ignored; of other mistakes it still does."""
    printed: list[object] = []
    monkeypatch.setattr(exits, "AGAIN_S", 0.01)
    monkeypatch.setattr(sys, "unraisablehook", lambda said: printed.append(said.exc_type))
    callbacks = (lambda _: signal.raise_signal(signal.SIGTERM), lambda _: raising(ValueError("a mistake")))

    def work() -> int:
        for callback in callbacks[::-1]:
            thing = set[int]()
            reference = weakref.ref(thing, callback)
            del thing
            assert reference() is None
        while True:
            time.sleep(0.01)

    assert exit_code("a", work, lambda: "Kept.", lambda _: None) == SIGTERM_EXIT
    assert printed == [ValueError]


def test_clean_up_is_not_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "AGAIN_S", 0.001)
    cleaned: list[int] = []

    def work() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            for number in range(20):
                signal.raise_signal(signal.SIGINT)  # somebody is impatient
                time.sleep(0.001)
                cleaned.append(number)
        return DONE

    assert exit_code("a", work, lambda: "Kept.", lambda _: None) == SIGTERM_EXIT
    assert cleaned == list(range(20))


def test_a_signal_on_its_way_when_the_work_ends_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch may send what was swallowed once more just before it ends; it must meet the handler that knows."""
    end, heard = exits._Insistence.end, list[int]()

    def late(self: exits._Insistence) -> None:
        end(self)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(exits._Insistence, "end", late)
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        assert exit_code("a", lambda: DONE, lambda: "Kept.") == DONE
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == []


def test_handlers_are_given_back_and_an_ignored_signal_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert exit_code("a", lambda: signal.raise_signal(signal.SIGINT) or DONE, lambda: "") == DONE
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_slide_is_no_place_to_lose_an_interruption() -> None:
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    with pytest.raises(KeyboardInterrupt), one_slide("a", Path("a.tif"), "read"):
        interrupted()
    with pytest.raises(SlideError), one_slide("a", Path("a.tif"), "read"):
        raise RuntimeError("damaged")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_end_changes_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Python gives the handlers back before it clears the modules; a command that is done is done."""
    command = tmp_path / "generate_large.py"
    command.write_text(
        "import os\n"
        "import engine  # the first import of every command\n"
        "from engine.core.exits import exit_code\n"
        "class Late:\n"
        f"    def __del__(self, pid=os.getpid(), kill=os.kill): kill(pid, {number:d})\n"
        "late = Late()\n"
        "raise SystemExit(exit_code('a', lambda: 3, lambda: 'Kept.'))\n"
    )
    ended = subprocess.run(
        [sys.executable, str(command)], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (3, "")
