"""What the viewer is tried on: a finished run with known px, a run at work, a slide, all made by the real writers."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.canvas.live_preview import LivePreviews, Shown
from engine.canvas.run_state import Progress, RunState, load_state, save_state
from engine.images.png import write_picture
from engine.viewer.app import Answer, App, Request
from engine.viewer.config import ViewConfig
from engine.viewer.guard import Guard
from engine.viewer.jobs import Jobs
from engine.viewer.library import Library
from tests.support.known_picture import HEIGHT, WIDTH, image_of
from tests.support.written_slides import box, ruler, write_tiff

KEYS: dict[str, object] = {
    "canvas.height": HEIGHT, "canvas.width": WIDTH, "sampling.seed": 7, "model.dtype": "float32",
    "plan.levels.20x": [325, 225], "plan.levels.10x": [163, 113],
}  # fmt: skip
HOST = "127.0.0.1:8765"
SCORES = {"seam_score": 1.02, "consistency_psnr_db": 21.5, "detail": {"gradient": 4.25}, "tiles_per_s": 3.0}


def run_at_work(folder: Path, steps: int = 0, process: int | None = None, **state: Any) -> Path:
    """Write a run that has committed `steps` steps, held by a process (None: this one)."""
    folder.mkdir(parents=True, exist_ok=True)
    where = f"process {process or os.getpid()} on {socket.gethostname()}\n"
    (folder / "run.lock").write_text(where)
    done = Progress(pass_index=1, steps=steps)
    save_state(folder / "state.json", RunState(KEYS, done, {"20x": 0, "10x": 0}, commits=steps + 1, **state))
    return folder


def previews_of(folder: Path, share: float = 1e9) -> LivePreviews:
    """Return who writes previews of such a run: latents are colours."""
    shown = Shown(lambda latents: latents, {"20x": 1, "10x": 2}, 0.5, tiles=lambda: 12, replicas=lambda: 2)
    previews = LivePreviews(folder, shown, share)
    previews.committed("20x", -1, 8)
    return previews


def publish(previews: LivePreviews, number: int, grey: float, steps: int = 8) -> None:
    """Publish step `number` of a pass, whose x0 is one grey (−1 … 1) on the canvas, and its negative on the guide."""
    for level, size, value in (("10x", (163, 113), -grey), ("20x", (325, 225), grey)):
        for y0 in range(0, size[0], 256):
            rows = np.full((3, min(256, size[0] - y0), size[1]), value, np.float32)
            previews.rows(level, size, number, number == steps - 1, y0, rows)
    previews.committed("20x", number, steps)


def finish(folder: Path) -> Path:
    """Let a run be finished: its picture, guide and report are there."""
    image_of(folder / "image.ome.zarr").build_pyramid()
    write_picture(folder / "guide.png", np.full((3, 656, 456), 200, np.uint8), {"synthetic": True})
    (folder / "report.json").write_text(json.dumps(SCORES))
    state = load_state(folder / "state.json")
    done = replace(state.progress, decoded_px=HEIGHT, finished=True)
    save_state(folder / "state.json", replace(state, progress=done, commits=state.commits + 1))
    return folder


def finished_run(folder: Path) -> Path:
    """Write a finished run of WIDTH × HEIGHT px."""
    return finish(run_at_work(folder, 8))


def caption(run: Path, *texts: str) -> None:
    """Let a run be one that was drawn from words."""
    state = load_state(run / "state.json")
    save_state(run / "state.json", replace(state, keys={**state.keys, "text_regions": list(texts)}))


def slide_file(path: Path, mpp: float | None = 0.5, **options: Any) -> Path:
    """Write a slide with two levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = ruler(0.5)
    write_tiff(path, [picture, box(picture, 4)], mpp, **options)
    return path


def app_of(path: Path, allow_write: bool = False, token: str | None = None, **config: Any) -> App:
    """Return what answers for a path."""
    asked = ViewConfig(str(path), token=token, **config)
    return App(Library(asked), Guard(asked.host, token, allow_write), Jobs())


def get(app: App, target: str, headers: Mapping[str, str] | None = None, method: str = "GET",
        body: bytes = b"") -> Answer:  # fmt: skip
    """Return the answer to a request as the page makes it."""
    return app.answer(Request(method, target, {"Host": HOST, **(headers or {})}, lambda: body))


def post(app: App, target: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    """Return the answer to a POST as the page makes it."""
    return get(app, target, {"Origin": f"http://{HOST}", **(headers or {})}, "POST", body)


def said(answer: Answer) -> Any:
    """Return the JSON of an answer."""
    return json.loads(answer.body)


def only_item(app: App) -> str:
    """Return the id of the one item."""
    (item,) = app.library.items
    return item.id
