"""A Ray crew whose encoder is killed as soon as its first block has come back."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import psutil

from engine.slide_crew import BlockResult, Crew


def killing(crew: Crew, killed: list[int]) -> Crew:
    """Return the crew, less one encoder's process after the first block; its id is appended to `killed`."""

    def work(tasks: Sequence[Any]) -> Iterator[Any]:
        for message in crew.work(tasks):
            if isinstance(message, BlockResult) and not killed:
                below = psutil.Process().children(recursive=True)
                killed.append(next(p.pid for p in below if "_Encoder" in p.name() or "MapWorker" in p.name()))
                os.kill(killed[0], signal.SIGKILL)
            yield message

    return replace(crew, work=work)
