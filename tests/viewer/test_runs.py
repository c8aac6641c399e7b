"""A run from its first commit to its picture, as the viewer sees it; and runs that die, vanish or lie elsewhere."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.canvas.canvas import Canvas
from engine.canvas.run_state import load_state, save_state
from engine.canvas.storage import open_storage
from engine.core.errors import EngineError
from engine.core.streaming import Box
from engine.viewer.jobs import redo_words
from engine.viewer.places import look
from engine.viewer.runs import Layer, RunView
from engine.viewer.tiles import GoneError
from tests.support.known_picture import HEIGHT, WIDTH
from tests.support.known_view import KEYS, caption, finish, finished_run, previews_of, publish, run_at_work
from tests.viewer.test_tiles import decoded


def view_of(folder: Path) -> RunView:
    return RunView(look(folder).items[0])


def names(view: RunView) -> list[str]:
    return [layer.name for layer in view.layers()]


def layer_of(view: RunView, name: str) -> Layer:
    return next(layer for layer in view.layers() if layer.name == name)


def test_from_the_first_commit_to_the_picture(tmp_path: Path) -> None:
    run = run_at_work(tmp_path / "run")
    view, previews = view_of(run), previews_of(run)
    assert names(view) == []
    assert view.progress()["finished"] is False
    publish(previews, 0, -0.5)
    assert names(view) == ["live_20x", "live_10x"]
    first = layer_of(view, "live_20x")
    assert first.live is not None
    assert (first.live.step, first.live.steps) == (1, 8)
    assert first.pyramid.size == (325, 225)
    assert view.mpp(view.layers()) == 0.5
    grey = decoded(first.pyramid.tile(first.pyramid.depths[1], 0, 0).data)
    assert (abs(grey - 64) < 3).all()
    publish(previews, 1, 0.5)
    second = layer_of(view, "live_20x")
    assert second.version != first.version  # so that no address of a tile is used twice
    assert (abs(decoded(second.pyramid.tile(second.pyramid.depths[1], 0, 0).data) - 191) < 3).all()
    before = view.signature()
    finish(run)
    assert view.signature() != before
    assert names(view) == ["picture", "guide"]
    assert layer_of(view, "picture").pyramid.size == (HEIGHT, WIDTH)
    assert layer_of(view, "guide").pyramid.size == (HEIGHT // 2, WIDTH // 2)  # what reaches beyond the canvas is cut
    assert view.progress()["finished"] is True


def test_how_fast_it_is(tmp_path: Path) -> None:
    run = run_at_work(tmp_path / "run", 1)
    publish(previews_of(run), 0, 0.0)
    said = view_of(run).progress()
    assert (said["step"], said["steps"], said["replicas"], said["alive"]) == (1, 8, 2, True)
    assert said["pass_name"] == "20x"


def test_a_run_that_died(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = run_at_work(tmp_path / "run", 3, process=gone.pid)
    assert view_of(run).progress()["alive"] is False
    (run / "run.lock").write_text("process 1 on another.example\n")
    assert view_of(run).progress()["alive"] is None
    (run / "run.lock").write_text("nonsense")
    assert view_of(run).progress()["alive"] is None


def test_a_run_that_is_deleted(tmp_path: Path) -> None:
    view = view_of(finished_run(tmp_path / "run"))
    layer = layer_of(view, "picture")
    shutil.rmtree(tmp_path / "run")
    for ask in (view.layers, view.progress, view.figures, lambda: layer.pyramid.tile(11, 0, 0)):
        with pytest.raises(GoneError, match="is gone"):
            ask()


def test_garbled_files_are_said_or_passed_over(tmp_path: Path) -> None:
    run = run_at_work(tmp_path / "run", 2)
    (run / "live").mkdir()
    for name, data in (("20x.jpg", b""), ("10x.jpg", b"\xff\xd8\xff\xfe\0\x04{}"), ("speed.json", b"[")):
        (run / "live" / name).write_bytes(data)
    (run / "quality.json").write_text("[" * 50_000)
    view = view_of(run)
    assert names(view) == []
    assert view.progress()["finished"] is False
    assert "kid" not in view.figures()
    (run / "state.json").write_text("{}")
    with pytest.raises(EngineError, match="state.json must say"):
        view.progress()


def test_figures(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (run / "quality.json").write_text(json.dumps({"figures": [{"name": "KID x1000", "value": 12.5}, {"name": "FID"}]}))
    found = view_of(run).figures()
    assert (found["seed"], found["seam"], found["agreement"], found["detail"], found["kid"]) == (
        7,
        1.02,
        21.5,
        4.25,
        12.5,
    )
    assert found["caption"] is None


def test_the_caption_is_the_texts_of_the_picture(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    caption(run, "stroma", "much fat")
    assert view_of(run).figures()["caption"] == "stroma; much fat"


def test_before_and_after_a_redo(tmp_path: Path) -> None:
    parent = finished_run(tmp_path / "cohort" / "run")
    redo = finished_run(tmp_path / "cohort" / "redo")
    state = load_state(redo / "state.json")
    save_state(redo / "state.json", replace(state, keys={**state.keys, "redo.region": [1, 2, 3, 4], "redo.seed": 9}))
    (redo / "redo.json").write_text(json.dumps({"run": "../run"}))
    item = next(item for item in look(tmp_path / "cohort").items if item.name == "redo")
    assert names(RunView(item)) == ["picture", "guide", "before"]
    assert RunView(item).figures()["seed"] == 9
    assert names(view_of(redo)) == ["picture", "guide"]  # the run lies outside of what is given then
    assert parent.is_dir()


def test_the_command_that_samples_again(tmp_path: Path) -> None:
    run = finished_run(tmp_path / 'it\'s; a "run" $(reboot)')
    view = view_of(run)
    words = redo_words(view.redo(Box.parse("100,200,300,256"), 5))
    assert words == ["--redo", "100,200,300,256", "--seed", "5", str(run.resolve())]
    for box in ("0,0,901,10", "0,0,0,10", "-1,0,5,5"):
        with pytest.raises(EngineError, match="inside the picture"):
            view.redo(Box.parse(box), 5)
    with pytest.raises(EngineError, match="seed"):
        view.redo(Box.parse("0,0,10,10"), -1)
    with pytest.raises(EngineError, match="must be finished"):
        view_of(run_at_work(tmp_path / "b")).redo(Box.parse("0,0,10,10"), 1)


def test_latents_that_lie_elsewhere(tmp_path: Path) -> None:
    """The folder here says where; how far the run is comes from there, and nothing is written."""
    run, store = tmp_path / "run", open_storage((tmp_path / "store").as_uri())
    keys = {k: v for k, v in KEYS.items() if not k.startswith("plan")}
    with Canvas.open(run, keys, {"20x": (325, 225)}, store) as canvas:
        for y0 in (0, 256):
            canvas.write("20x", y0, np.zeros((3, min(256, 325 - y0), 225), np.float32))
        canvas.commit(0, 3)
        files = sorted(path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*"))
        said = view_of(run).progress()
        assert (said["step"], said["store"]) == (3, (tmp_path / "store").as_uri())
        assert files == sorted(path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*"))


def test_latents_that_lie_in_a_bucket(tmp_path: Path, s3_url: str) -> None:
    run, keys = tmp_path / "run", {k: v for k, v in KEYS.items() if not k.startswith("plan")}
    with Canvas.open(run, keys, {"20x": (325, 225)}, open_storage(s3_url)) as canvas:
        for y0 in (0, 256):
            canvas.write("20x", y0, np.zeros((3, min(256, 325 - y0), 225), np.float32))
        canvas.commit(0, 3)
        said = view_of(run).progress()
    assert (said["step"], said["store"]) == (3, s3_url)
