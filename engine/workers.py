"""Work on bands beside the loop that feeds replicas: bounded, in threads, and no error is lost.

The threads gain because numpy, torch and files let others run meanwhile. It does not know what the work is.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class Workers:
    """Some threads, alive inside `with`; leaving it waits for what is at work and drops what is not begun."""

    def __init__(self, threads: int = 2, limit: int = 3) -> None:
        """At most `limit` pieces of work are under way: at 65536² one holds about 0.25 GB."""
        self._threads, self._limit = threads, limit
        self._executor: ThreadPoolExecutor | None = None
        self._under_way: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        self._executor = ThreadPoolExecutor(self._threads, "bands")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        assert self._executor is not None  # __enter__ made it
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = None
        self._under_way.clear()

    def do(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, when there is room for it. Raises what an earlier piece raised."""
        if self._executor is None:
            raise RuntimeError("work must be given inside `with`; got it outside.")
        while len(self._under_way) >= self._limit:
            self._under_way.popleft().result()
        self._under_way.append(self._executor.submit(work))

    def wait(self) -> None:
        """Return when everything is done. Raises what a piece raised."""
        while self._under_way:
            self._under_way.popleft().result()

    @property
    def idle(self) -> bool:
        """Whether nothing is at work or waits to be."""
        return all(piece.done() for piece in self._under_way)
