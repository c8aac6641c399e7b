"""One run at a time in object storage, where no lock dies with its process: a lease that its owner renews.

Whoever takes or renews it replaces the object he read, so of two at once one is refused. Machines' clocks are not
compared: a lease is free when it said so, when it stood still while it was watched, or when its owner was a process of
this machine that is gone. It does not guard against an owner who wakes up late; that is the storage's matter.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from engine.canvas.object_client import Objects, OvertakenError, Version
from engine.core.errors import CanvasError
from engine.core.files import LOCK

log = logging.getLogger(__name__)

BEAT_S = 10.0
"""Between two renewals."""
WATCH_S = 60.0
"""A lease that was not renewed for so long is free."""


class Lease:
    """The right to work on a run; renewed by a thread until it is released."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._id = uuid.uuid4().hex
        self._count = 0
        self._version: Version | None = None
        """None while it is not ours."""
        self._lost = False
        self._answered = True
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease. Raises CanvasError if a live run has it, or the store does not keep to conditions."""
        found = self._objects.get(LOCK)
        if found is not None and not _free(self._read(found[0])):
            found = self._watch(found)
        try:
            version = self._put(None if found is None else found[1])
            self._check_conditions(version)
        except OvertakenError as error:
            raise self._in_use("another run that came first") from error
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Raise CanvasError if another run has taken the lease."""
        if self._lost:
            raise self._taken()

    def release(self) -> None:
        """Let another run in; harmless when repeated. If the store does not answer, the lease runs out by itself."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._version is not None and self._answered and not self._lost:
            try:
                self._put(self._version, free=True)
            except CanvasError as error:
                log.warning("%s The lease is free again in %g s.", error, WATCH_S)
        self._version = None

    def _put(self, replaces: Version | None, free: bool = False) -> Version:
        """Write the lease, never twice the same."""
        self._count += 1
        owner = None if free else _myself()
        content = {"id": self._id, "count": self._count, "owner": owner}
        self._version = self._objects.put(LOCK, (json.dumps(content) + "\n").encode(), replaces)
        return self._version

    def _read(self, data: bytes) -> dict[str, str | int] | None:
        """Return the owner of a lease; None when it was released."""
        try:
            owner = json.loads(data)["owner"]
            return None if owner is None else {key: owner[key] for key in _myself()}
        except (ValueError, KeyError, TypeError) as error:
            raise CanvasError(
                f"{self._objects.where}/{LOCK} must be a lease of this engine; {error}. If no run works there, remove "
                "it; otherwise use another canvas.store."
            ) from error

    def _watch(self, found: tuple[bytes, Version]) -> tuple[bytes, Version] | None:
        """Return the lease when it is free. Raises CanvasError once its owner shows that he lives."""
        owner = self._read(found[0])
        assert owner is not None  # the caller saw
        who = f"process {owner.get('process')} on {owner.get('host')}"
        gone = _is_gone(owner)
        if gone is False:
            raise self._in_use(who)
        if gone:
            return found
        log.warning("%s is leased by %s; watching for %g s whether it lives.", self._objects.where, who, WATCH_S)
        end = time.monotonic() + WATCH_S
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_S / 20))
            now = self._objects.get(LOCK)
            if now is None or _free(self._read(now[0])):
                return now
            if now[1] != found[1]:
                raise self._in_use(who)
        return found

    def _check_conditions(self, version: Version) -> None:
        """Hold the store to its conditions: some accept them and write all the same."""
        self._put(version)
        for stale in (None, version):
            with contextlib.suppress(OvertakenError):
                self._put(stale)
                raise CanvasError(
                    f"{self._objects.where}: the store must refuse a write whose condition (If-None-Match, "
                    "If-Match) does not hold; it wrote. Use another store, or a folder (file:///…)."
                )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._put(self._version)
                self._answered = True
            except OvertakenError:
                self._lost = True
                return
            except CanvasError:  # the next beat may get through; nobody else can reach the store either, or takes over
                self._answered = False

    def _in_use(self, who: str) -> CanvasError:
        return CanvasError(
            f"{self._objects.where} must belong to one run at a time; it is in use by {who}. Wait for that run, "
            "stop it, or use another canvas.store."
        )

    def _taken(self) -> CanvasError:
        return CanvasError(
            f"{self._objects.where} must belong to one run at a time; another run has taken it, because this one was "
            f"silent for {WATCH_S:g} s. What was committed stands. Stop the other run before you continue this one."
        )


def _free(owner: dict[str, str | int] | None) -> bool:
    return owner is None


def _myself() -> dict[str, str | int | None]:
    """Return who owns a lease: words for people, and what says without doubt whether the process lives."""
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),
        "started": _started(os.getpid()),
    }


def _is_gone(owner: dict[str, str | int]) -> bool | None:
    """Say whether the owner's process has ended; None if it runs, or ran, where it cannot be seen from here."""
    me = _myself()
    if (owner.get("machine"), owner.get("namespace")) != (me["machine"], me["namespace"]):
        return None
    return _started(int(owner["process"])) != owner.get("started")


def _started(process: int) -> int | None:
    """Return when a process began, in ticks since the machine did; None when it has ended."""
    try:
        # The name, which may hold anything, stands in brackets before the other fields: proc(5).
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
