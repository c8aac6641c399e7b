"""A command that hears a signal at a random moment of a phase, and what must be true of its end.

A phase begins when the command has written or printed something, is seen to catch signals, or has children: events,
not clocks. Only the delay after that is drawn, within what the phase lasts undisturbed.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import psutil

from tests.support.forked import start

ROOT = Path(__file__).parents[2]
Begun = Callable[[psutil.Process, Path, Path], bool]
"""Says of a process, its output folder and its log whether a phase has begun."""
NOISE = re.compile(r"Traceback|Exception ignored|^\w*(Error|Interrupt|Exit)\b|core dumped|\(raylet\)", re.M)
"""What no user should see of an interruption."""
ENDS_S = 300.0
"""Longest patience for the end after a signal, on a busy machine."""


def writes(pattern: str, count: int = 1) -> Begun:
    """Begin when so many files of the output folder match."""
    return lambda process, out, log: len(list(out.glob(pattern))) >= count


def prints(text: str) -> Begun:
    """Begin when the command has said something."""
    return lambda process, out, log: text in log.read_text(errors="replace")


def catches_signals(process: psutil.Process, out: Path, log: Path) -> bool:
    """Begin when the command handles SIGTERM itself: Python runs, the long imports come."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)  # type: ignore[index]
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def has_children(process: psutil.Process, out: Path, log: Path) -> bool:
    """Begin when the command has started another process: a private Ray comes up."""
    try:
        return bool(process.children())
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Command:
    """A command on tiny inputs."""

    module: str
    argv: Sequence[str]
    """Without the output folder; {out} stands for it."""
    out: str
    """The flag that names it, with "="."""
    phases: dict[str, Begun]
    """In the order in which they begin."""
    fresh: bool = False
    """Whether it needs a process of its own: its imports are a phase, or it starts Ray."""

    def words(self, folder: Path) -> list[str]:
        return [*(word.replace("{out}", str(folder / "out")) for word in self.argv), f"{self.out}{folder / 'out'}"]


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    left: list[str]
    """Command lines of processes that it started and that are still there."""


class Running:
    """A command in a process of its own, the first of its group."""

    def __init__(self, command: Command, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.out = folder / "log", folder / "out"
        self.log.write_text("")
        words = command.words(folder)
        self._children: dict[psutil.Process, str] = {}
        if command.fresh:
            environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
            with self.log.open("wb") as log:
                self._popen: subprocess.Popen[bytes] | None = subprocess.Popen(
                    [sys.executable, "-m", command.module, *words],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            pid = self._popen.pid
        else:
            self._popen, self._forked = None, start(_run, command.module, words, str(self.log))
            pid = self._forked.pid or 0
        self.process = psutil.Process(pid)

    def code(self) -> int | None:
        return self._popen.poll() if self._popen is not None else self._forked.exitcode

    def wait_for(self, begun: Begun) -> bool:
        """Wait until a phase begins; False if the process ended before."""
        while self.code() is None:
            self._look()
            if begun(self.process, self.out, self.log):
                return True
            time.sleep(0.005)
        return False

    def send(self, number: signal.Signals) -> None:
        """Send SIGTERM to the command, as a scheduler does, or SIGINT to its group, as a terminal does."""
        self._look()
        try:
            os.killpg(self.process.pid, number) if number == signal.SIGINT else os.kill(self.process.pid, number)
        except ProcessLookupError:
            return

    def end(self) -> Ended:
        """Wait for the end."""
        until = time.monotonic() + ENDS_S
        while self.code() is None and time.monotonic() < until:
            self._look()
            time.sleep(0.01)
        code = self.code()
        if code is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"it must end within {ENDS_S:g} s of a signal; it said:\n{self.log.read_text()}")
        _, alive = psutil.wait_procs(self._children, timeout=5)
        left = [self._children[process] for process in alive]
        for process in alive:
            process.kill()
        return Ended(code, self.log.read_text(errors="replace"), left)

    def _look(self) -> None:
        """Note the processes below it, which are nobody's children when it is gone."""
        try:
            for child in self.process.children(recursive=True):
                if child not in self._children:
                    self._children[child] = " ".join(child.cmdline())[:150]
        except psutil.NoSuchProcess:
            return


def _run(module: str, words: list[str], log: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = import_module(module).main(words)
    sys.stdout.flush()
    os._exit(code)  # as commands do: no handler of the tests' own is in the way


@dataclass(frozen=True)
class Undisturbed:
    """What a command does when nobody interrupts it."""

    lasts: dict[str, float]
    """Seconds of each phase."""
    files: dict[str, str]
    """sha256 of each file whose bytes are the same in every run."""


def undisturbed(command: Command, folder: Path) -> Undisturbed:
    """Run a command twice."""
    times: dict[str, float] = {}
    running = Running(command, folder / "first")
    for phase, begun in command.phases.items():
        if not running.wait_for(begun):
            raise AssertionError(f"{command.module} must come to the phase {phase!r}; it said:\n{running.end().said}")
        times[phase] = time.monotonic()
    ended = running.end()
    assert ended.code == 0, ended.said
    stops = [*list(times.values())[1:], time.monotonic()]
    lasts = {phase: stop - begun for (phase, begun), stop in zip(times.items(), stops, strict=True)}
    second = Running(command, folder / "second").end()
    assert second.code == 0, second.said
    one, two = (bytes_of(folder / name / "out") for name in ("first", "second"))
    return Undisturbed(lasts, {name: digest for name, digest in one.items() if two.get(name) == digest})


def bytes_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder, or of the file itself; live previews come as time allows."""
    paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if path.parent.name != "live"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def assert_ended_well(ended: Ended, number: signal.Signals) -> bool:
    """Say whether the command was interrupted, not done before; assert one line, the code, and nobody left."""
    assert not NOISE.search(ended.said), ended.said
    assert not ended.left, ended.left
    lines = [line for line in ended.said.splitlines() if "Interrupted." in line]
    if ended.code == 0:
        assert not lines, ended.said
        return False
    assert ended.code == 128 + number, f"code {ended.code}:\n{ended.said}"
    assert len(lines) == 1, ended.said
    assert ended.said.rstrip().endswith(lines[0]), ended.said
    return True


def assert_resumes(command: Command, folder: Path, wanted: Undisturbed) -> None:
    """Repeat the command; it must end well and leave the undisturbed run's bytes."""
    ended = Running(command, folder).end()
    assert ended.code == 0, ended.said
    assert not NOISE.search(ended.said), ended.said
    found = bytes_of(folder / "out")
    differing = [name for name, digest in wanted.files.items() if found.get(name) != digest]
    assert not differing, f"other bytes than undisturbed: {differing}"
