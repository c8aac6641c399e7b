"""How a command ends and prints: exit codes, SIGINT and SIGTERM, and letters that the terminal's encoding lacks.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but for some inputs, 130 or 143 interrupted. It imports little.

A signal becomes an exception wherever the main thread is: also inside a library's lock, whose release then raises
another one, or where exceptions are swallowed (a destructor, a callback), of which Python prints a traceback. So an
interruption is looked for behind any exception, is not printed, and is raised again until the command ends or cleans
up.
"""

import atexit
import codecs
import io
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

from engine.core.errors import EngineError

DONE, FAILED, USAGE, PARTLY = 0, 1, 2, 3
SIGTERM_EXIT = 128 + signal.SIGTERM
AGAIN_S = 1.0
"""A signal that was swallowed is raised again after this long."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SCRIPTS, _MODULES = ("generate_large.py", "zoomldm"), ("generate_large", "engine", "mil")


def interruption_behind(error: BaseException | None) -> BaseException | None:
    """Return the KeyboardInterrupt or SystemExit(143) that an exception is, or was raised while handling, or None."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        if isinstance(found, KeyboardInterrupt) or (isinstance(found, SystemExit) and found.code == SIGTERM_EXIT):
            return found
        seen.add(id(found))
        waiting += [found.__cause__, found.__context__]
    return None


def _raise(number: int, frame: FrameType | None) -> None:
    """Raise what a signal becomes, unless that is being dealt with already: clean-up is not to be cut short."""
    del frame
    if interruption_behind(sys.exc_info()[1]) is not None:
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(SIGTERM_EXIT)


@contextmanager
def sigterm_as_exit() -> Generator[Callable[[], object]]:
    """Turn SIGTERM into SystemExit(143) inside; yields a function that takes the signal again from whoever took it.

    Only the main thread of a process may do so; elsewhere nothing changes. Inside a command, its own handler stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    previous = signal.getsignal(signal.SIGTERM)
    handler = previous if _Insistence.is_its_own(previous) else _raise
    signal.signal(signal.SIGTERM, handler)
    try:
        yield lambda: signal.signal(signal.SIGTERM, handler)
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


class _Insistence:
    """Hears SIGINT and SIGTERM in the main thread, and raises what was swallowed again."""

    def __init__(self) -> None:
        self.heard: int | None = None
        """The first signal."""
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        self._read, self._write = os.pipe()  # a thread cannot be started in a handler: threading's locks may be held
        self._watch = threading.Thread(target=self._insist, daemon=True, name="signals")
        self._watch.start()

    @staticmethod
    def is_its_own(handler: Any) -> bool:
        """Say whether a handler of a signal is one of these."""
        return isinstance(getattr(handler, "__self__", None), _Insistence)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; one that comes when the work is over changes nothing."""
        if self._over.is_set():
            return
        if self.heard is None:
            self.heard = number
            os.write(self._write, bytes([number]))
        _raise(number, frame)

    def end(self) -> None:
        """Raise nothing any more; call it while the signals are still heard, for one may be on its way."""
        self._over.set()
        os.write(self._write, b"\0")  # wakes the thread if nothing was heard
        self._watch.join()

    def close(self) -> None:
        """Let go of the pipe, after the signals are somebody else's."""
        os.close(self._write)
        os.close(self._read)

    def _insist(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they are the main thread's
        told = os.read(self._read, 1)
        while not self._over.wait(AGAIN_S):
            if interruption_behind(self._handled()) is None and self._main is not None:
                signal.pthread_kill(self._main, told[0])

    def _handled(self) -> BaseException | None:
        """Return the exception that the main thread handles now."""
        handled: dict[int, Any] = getattr(sys, "_current_exceptions")()  # noqa: B009  # documented, its name is not
        found = handled.get(self._main or 0)
        return None if found is None else _exception_of(found)


def _exception_of(found: Any) -> BaseException | None:
    """Return the exception of sys._current_exceptions' entry: three values in Python 3.11, itself from 3.12 on."""
    if isinstance(found, BaseException):
        return found
    return cast("tuple[object, BaseException, object]", found)[1]


@contextmanager
def _signals_heard() -> Generator[Callable[[], int | None]]:
    """Raise KeyboardInterrupt and SystemExit(143) for signals inside; yields what tells the first one."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # A shell that starts a command in its background lets it ignore SIGINT, and nohup users may both.
    taken = [number for number in _SIGNALS if before[number] is not signal.SIG_IGN]
    insistence, told = _Insistence(), sys.unraisablehook
    sys.unraisablehook = lambda said: None if interruption_behind(said.exc_value) is not None else told(said)
    try:
        for number in taken:
            signal.signal(number, insistence.hear)
        yield lambda: insistence.heard
    finally:
        insistence.end()
        sys.unraisablehook = told
        for number in taken:
            signal.signal(number, before[number] or signal.SIG_DFL)
        insistence.close()


def say(text: str) -> None:
    """Print a line for whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def exit_code(
    prog: str, work: Callable[[], int], interrupted: Callable[[], str], say: Callable[[str], object] = say
) -> int:
    """Do a command's work and return its exit code; what went wrong, or how to go on, is said in a line.

    `interrupted` says what is kept. Raises: SystemExit where the work ends the process itself.
    """
    code = _code_of(prog, work, interrupted, say)
    _leave_at_once_on_signals(code)
    return code


def _code_of(prog: str, work: Callable[[], int], interrupted: Callable[[], str], say: Callable[[str], object]) -> int:
    with _signals_heard() as heard:
        try:
            return work()
        except BaseException as error:
            stop = interruption_behind(error)
            number = heard() or (None if stop is None else signal.SIGINT if isinstance(stop, KeyboardInterrupt) else 15)
            if number is not None:
                say(f"Interrupted. {interrupted()}")
                return 128 + number
            if isinstance(error, EngineError):
                say(f"{prog}: {error}")
                return FAILED
            raise  # a mistake, or somebody else's exit


def is_command() -> bool:
    """Say whether this process was started as one of the project's commands."""
    words = sys.orig_argv[1:]
    if "-m" in words:
        module = words[words.index("-m") + 1 :][:1]
        return bool(module) and module[0].split(".")[0] in _MODULES
    return any(Path(word).name in _SCRIPTS for word in words[:3])


def leave_early_on_signals() -> None:
    """Let a command that is still being imported end at a signal in one line; call it before the long imports."""
    if not is_command() or threading.current_thread() is not threading.main_thread():
        return

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"Interrupted. Nothing was begun; run the same command again.\n")
        os._exit(128 + number)

    # Registered before the long imports, so it is called after what they register. Then Python gives every handler
    # back to the system, and a signal would kill a command that is done.
    atexit.register(_ignore_signals)
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, leave)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave_at_once_on_signals(code: int) -> None:
    """Let a signal that comes while Python shuts down change nothing: all is written and said."""
    if not is_command() or threading.current_thread() is not threading.main_thread():
        return

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(code)

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


_READABLE = {
    **{"→": "->", "←": "<-", "↔": "<->", "×": "x", "µ": "u", "μ": "u", "·": "*", "…": "...", "±": "+/-", "√": "sqrt "},
    **{"≤": "<=", "≥": ">=", "≈": "~", "−": "-", "–": "-", "—": "-", "‒": "-", "‑": "-", "‐": "-", "⁄": "/", "ß": "ss"},
    **{"α": "alpha", "ᾱ": "alpha_bar", "σ": "sigma", "Σ": "sum", "─": "-", "│": "|", "├": "|", "└": "`"},
    **{"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\u2212": "-"},
    # Without a caret, 4096² would read as 40962.
    **{letter: f"^{digit}" for digit, letter in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    "⁻": "^-",
}


def print_anywhere() -> None:
    """Let stdout and stderr replace letters that their encoding lacks: µ by u, → by ->, others by ASCII or \\uXXXX.

    Bytes of file names that are no text come out as they are. Commands call this before they print anything.
    """
    codecs.register_error("readable", _readable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="readable")


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":  # how Python keeps a byte of a file name that it cannot decode
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    plain = "".join(part for part in map(_plain, unicodedata.normalize("NFKD", letter)))
    return _READABLE.get(letter) or plain or f"\\u{ord(letter):04x}", error.start + 1


def _plain(letter: str) -> str:
    return letter if letter.isascii() else _READABLE.get(letter, "")
