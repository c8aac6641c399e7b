"""SIGTERM, which schedulers send before they kill, ends a run as Ctrl-C does: it unwinds, cleans up and says so.

It knows no run. What a run has committed needs nothing more: every finished step is on the disk already.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGTERM_EXIT = 128 + signal.SIGTERM


@contextmanager
def sigterm_as_exit() -> Iterator[Callable[[], object]]:
    """Turn SIGTERM into SystemExit(143) inside; yields a function that takes the signal again from whoever took it.

    Only the main thread of a process may do so; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def leave(signum: int, frame: object) -> None:
        del signum, frame
        sys.exit(SIGTERM_EXIT)

    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, leave)
    try:
        yield lambda: signal.signal(signal.SIGTERM, leave)
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
