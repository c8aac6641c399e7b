"""Work that the page asks for: a region sampled again (only where writing is allowed), true px of a run at work.

One job at a time, few wait, each can be asked how it is. What runs is a process of its own or a thread that writes to a
scratch folder alone; the run that is looked at is never written. It does not know requests.
"""

import itertools
import queue
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.core.errors import UNREADABLE, EngineError
from engine.core.streaming import Box
from engine.generation.finished_run import FinishedRun
from engine.generation.inpaint import InpaintConfig, region_folder
from engine.generation.preview import predict_picture
from engine.generation.run import stored_config
from engine.viewer.tiles import FlatPyramid

MOST_WAITING = 4
MOST_KEPT = 16
LARGEST_REGION_PX = 1024
"""Side of a region that is decoded on demand: 16 windows."""
PATIENCE_S = 10.0
"""How long a process may take to end by itself."""


class BusyError(EngineError):
    """Too many jobs wait."""


def redo_words(asked: InpaintConfig) -> list[str]:
    """Return the command line of generate_large.py that samples a region again."""
    return ["--redo", asked.redo, "--seed", str(asked.seed), asked.run]


@dataclass
class Job:
    """One piece of work."""

    id: str
    item: str
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=12))
    """The last lines it printed."""
    result: dict[str, Any] = field(default_factory=dict)
    pixels: FlatPyramid | None = None

    def said(self) -> dict[str, Any]:
        """Return how it is, for the page."""
        return {"id": self.id, "item": self.item, "state": self.state, "lines": list(self.lines), **self.result}


class Jobs:
    """The jobs of one viewer."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Job, Callable[[Job], None]]] = queue.Queue(MOST_WAITING)
        self._known: OrderedDict[str, Job] = OrderedDict()
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[str] | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, item: str, work: Callable[[Job], None]) -> Job:
        """Queue some work. Raises: BusyError."""
        job = Job(str(next(self._numbers)), item)
        with self._lock:
            try:
                self._queue.put_nowait((job, work))
            except queue.Full as error:
                raise BusyError(
                    f"at most {MOST_WAITING} jobs may wait; there are as many. Ask again when one is done."
                ) from error
            self._known[job.id] = job
            while len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="viewer jobs", daemon=True)
                self._thread.start()
        return job

    def job(self, name: str) -> Job:
        """Return a job by its id. Raises: LookupError."""
        return self._known[name]

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                job, work = self._queue.get(timeout=0.5)
            except queue.Empty:
                continue
            job.state = "running"
            try:
                work(job)
                job.state = "done"
            except (EngineError, *UNREADABLE) as error:
                job.lines.append(str(error))
            finally:  # whatever ended it, nobody waits for it
                job.state = "done" if job.state == "done" else "failed"
                self._queue.task_done()

    def redo(self, asked: InpaintConfig, show: Callable[[Path], str]) -> Callable[[Job], None]:
        """Return the work that samples a region again in a process; `show` makes its run an item."""

        def work(job: Job) -> None:
            folder = region_folder(asked, FinishedRun(Path(asked.run)))
            command = [sys.executable, "-m", "engine", "generate", *redo_words(asked)]
            with self._lock:
                if self._closing.is_set():
                    raise EngineError("the viewer is being stopped.")
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                    errors="replace", start_new_session=True,
                )  # fmt: skip
            process = self._process
            assert process.stdout is not None
            with process.stdout as lines:
                for line in lines:
                    job.lines.append(line.rstrip()[:300])
            if process.wait() != 0:
                raise EngineError(f"the command ended with exit code {process.returncode}; its last lines say why.")
            job.result["shows"] = show(folder)

        return work

    def pixels(self, folder: Path, model: str, box: Box) -> Callable[[Job], None]:
        """Return the work that predicts and decodes a region of a run as it is now. Raises: EngineError."""
        if max(box.size) > LARGEST_REGION_PX:
            raise EngineError(
                f"a region that is decoded must have at most {LARGEST_REGION_PX} px on a side; got {box.size[1]} x "
                f"{box.size[0]}. Draw a smaller box."
            )

        def work(job: Job) -> None:
            config = stored_config(folder, {"model.source": model})
            with tempfile.TemporaryDirectory() as scratch:
                image = predict_picture(folder, config, box, Path(scratch))
                job.pixels = FlatPyramid(np.ascontiguousarray(image.read(0, image.height).transpose(1, 2, 0)))
                said = image.provenance.get("unfinished")
            job.result |= {"box": box.xywh, "unfinished": said}

        return work

    def close(self) -> None:
        """End what is at work and take no more."""
        with self._lock:
            self._closing.set()
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
