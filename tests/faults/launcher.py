"""generate_large.py in a process of its own, with a fault at a chosen instant: at the n-th call of a chosen function.

The engine knows nothing of it: functions are wrapped here, before the command starts. The imports take longer than the
run, hence the fork. A function is named "module:attribute".
"""

import importlib
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from tests.support.forked import start

Act = Literal["kill", "kill after", "term", "fill", "limit", "sleep"]
COUNTED = ("os:fsync", "os:replace", "engine.images.ome_zarr:Image.read", "engine.canvas.canvas:Canvas.commit")
"""Functions whose calls an undisturbed run counts, so that instants can be drawn from all of them."""


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th call (from 1) of a function.

    kill: SIGKILL before it; "kill after": SIGKILL when it has returned; term: SIGTERM before it; fill: the disk of
    `folder` is filled up; limit: no file may grow beyond 20 kB; sleep: the process stays there.
    """

    at: str
    call: int
    act: Act
    folder: str = ""


class Started:
    """A run in its own process."""

    def __init__(self, argv: list[str], log: Path, fault: Fault | None = None, counts: Path | None = None) -> None:
        self._log = log
        log.write_text("")  # for a run that is killed before it can say anything
        self._process = start(_run, argv, str(log), fault, counts and str(counts))

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there to take it."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def end(self, timeout_s: float = 900) -> tuple[int, str]:
        """Wait for the end; return the exit code (a signal's is negative) and what was said."""
        self._process.join(timeout_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"the run must end within {timeout_s:g} s; it said:\n{self._log.read_text()}")
        code = self._process.exitcode
        assert code is not None
        return code, self._log.read_text()


def run(argv: list[str], log: Path, fault: Fault | None = None, counts: Path | None = None) -> tuple[int, str]:
    """Start a run and wait for it; return the exit code and what it said."""
    return Started(argv, log, fault, counts).end()


def _run(argv: list[str], log: str, fault: Fault | None, counts: str | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import generate_large
    from tests.support.chunk_writers import record_writers

    record_writers()
    found: dict[str, itertools.count] = {}
    if fault is not None:
        _wrap(fault.at, _strike(fault))
    if counts is not None:
        for name in COUNTED:
            found[name] = itertools.count()
            _wrap(name, _counting(found[name]))
    began = time.monotonic()
    code = generate_large.main(argv)
    if counts is not None:
        record = {name: next(count) for name, count in found.items()}
        Path(counts).write_text(json.dumps({"calls": record, "seconds": time.monotonic() - began}))
    sys.exit(code)


def _wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, last = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    setattr(owner, last, make(getattr(owner, last)))


def _counting(calls: itertools.count) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            next(calls)
            return function(*args, **kwargs)

        return counted

    return make


def _strike(fault: Fault) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    calls = itertools.count(1)

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def struck(*args: Any, **kwargs: Any) -> Any:
            due = next(calls) == fault.call
            if due and fault.act != "kill after":
                _act(fault)
            value = function(*args, **kwargs)
            if due and fault.act == "kill after":
                _act(fault)
            return value

        return struck

    return make


def _act(fault: Fault) -> None:
    if fault.act.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.act == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.act == "fill":
        fill(Path(fault.folder))
    elif fault.act == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:
        time.sleep(600)


def fill(folder: Path) -> None:
    """Fill the disk of a folder to its last byte with a file named ballast."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
