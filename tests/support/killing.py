"""A Ray backend whose encoder is killed as soon as its first block has come back."""

import os
import signal
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import psutil

from engine.pipeline.stages import Backend, BlockResult


def killing(backend: Backend, killed: list[int]) -> Backend:
    """Return the backend, less one encoder's process after the first block; its id is appended to `killed`."""

    def work(tasks: Sequence[Any], given_up: Collection[str] = ()) -> Iterator[Any]:
        for message in backend.work(tasks, given_up):
            if isinstance(message, BlockResult) and not killed:
                below = psutil.Process().children(recursive=True)
                killed.append(next(p.pid for p in below if "_Encoder" in p.name() or "MapWorker" in p.name()))
                os.kill(killed[0], signal.SIGKILL)
            yield message

    return replace(backend, work=work)
