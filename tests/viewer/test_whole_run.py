"""Real runs of a tiny model: previews change no byte, a redo and true px on demand do what the page says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import generate_large
from engine.canvas.live_preview import LivePreviews, read_facts, read_speed
from engine.images.ome_zarr import Image
from engine.viewer.app import App
from tests.support.known_view import app_of, get, only_item, post, said
from tests.support.tiny_run import store_inputs

HEIGHT, WIDTH = 640, 384


def flags(folder: Path, name: str, inputs: dict[str, object]) -> list[str]:
    asked = {
        **inputs, "canvas.height": HEIGHT, "canvas.width": WIDTH, "sampling.stride": 400, "sampling.weight": 0,
        "sampling.batch_size": 2, "decode.batch_size": 2, "ray.enabled": "false", "output.folder": folder / name,
        "output.formats": "[png]",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in asked.items()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return store_inputs(tmp_path_factory.mktemp("inputs"), 3, 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, object]) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert generate_large.main(flags(folder, "run", inputs)) == 0
    return folder / "run"


def test_a_run_leaves_previews_of_its_levels(finished: Path) -> None:
    names = sorted(path.name for path in (finished / "live").iterdir())
    assert "speed.json" in names
    levels = [read_facts((finished / "live" / name).read_bytes()) for name in names if name.endswith(".jpg")]
    assert {facts.level for facts in levels if facts} >= {"20x"}
    finest = next(facts for facts in levels if facts and facts.level == "20x")
    assert (finest.height, finest.width, finest.step, finest.mpp) == (HEIGHT // 4, WIDTH // 4, finest.steps, 0.5)
    speed = read_speed(finished)
    assert speed is not None
    assert speed.step == speed.steps


def test_previews_change_no_byte(
    finished: Path, inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.generation.run.live_previews", lambda *_: None)
    assert generate_large.main(flags(tmp_path, "run", inputs)) == 0
    assert not (tmp_path / "run" / "live").exists()
    assert (tmp_path / "run" / "image.png").read_bytes() == (finished / "image.png").read_bytes()


def wait(app: App, job: dict[str, Any]) -> dict[str, Any]:
    """Wait for a job's end; its state changes by itself."""
    app.jobs._queue.join()
    return said(get(app, f"/job/{job['id']}"))


def test_a_region_is_sampled_again_and_shown(finished: Path) -> None:
    """In a process of its own, as typed; the new run is an item, with the old picture as a layer where that is seen."""
    app = app_of(finished.parent, allow_write=True)
    item = only_item(app)
    asked = json.dumps({"item": item, "box": "20,440,100,100", "seed": 7}).encode()
    job = wait(app, said(post(app, "/redo", asked)))
    assert job["state"] == "done", job
    found = said(get(app, f"/item/{job['shows']}"))
    assert [layer["name"] for layer in found["layers"]] == ["picture", "guide", "before"]
    assert found["figures"]["redo"] == [20, 440, 100, 100]
    new = Image.open(Path(found["path"]) / "image.ome.zarr").read(0, HEIGHT)
    old = Image.open(finished / "image.ome.zarr").read(0, HEIGHT)
    assert (new != old).any()
    np.testing.assert_array_equal(new[:, :192], old[:, :192])
    app.jobs.close()


def test_a_job_that_fails_says_why(finished: Path, tmp_path: Path) -> None:
    app = app_of(finished, allow_write=True)
    item = only_item(app)
    moved = finished / "config.yaml"
    kept = moved.read_bytes()
    moved.unlink()
    try:
        job = said(post(app, "/redo", json.dumps({"item": item, "box": "0,0,64,64", "seed": 1}).encode()))
        job = wait(app, job)
    finally:
        moved.write_bytes(kept)
    assert job["state"] == "failed"
    assert "exit code" in job["lines"][-1]
    assert any("config.yaml must say" in line for line in job["lines"])
    app.jobs.close()


def test_true_px_of_a_run_at_work(inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = LivePreviews.committed

    def stop(previews: LivePreviews, pass_name: str, number: int, steps: int) -> None:
        committed(previews, pass_name, number, steps)
        if number == 0 and (tmp_path / "run" / "live" / "20x.jpg").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LivePreviews, "committed", stop)
        assert generate_large.main(flags(tmp_path, "run", inputs)) == 130
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    app = app_of(tmp_path / "run", model=str(inputs["model.source"]))
    item = only_item(app)
    shown = said(get(app, f"/item/{item}"))
    assert shown["may"]["pixels"]
    assert [layer["name"] for layer in shown["layers"]][0] == "live_20x"
    for box in ("0,0,2000,10", "1,2,3"):
        assert post(app, "/pixels", json.dumps({"item": item, "box": box}).encode()).status == 422
    job = wait(app, said(post(app, "/pixels", json.dumps({"item": item, "box": "32,64,200,100"}).encode())))
    assert job["state"] == "done", job
    assert job["unfinished"]["steps_done"] == 1
    assert (job["layer"]["width"], job["layer"]["height"]) == (200, 100)
    tile = get(app, f"/dzi/{item}/{job['layer']['name']}/{job['layer']['deepest']}/0_0.jpg")
    assert (tile.status, tile.body[:2]) == (200, b"\xff\xd8")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    app.jobs.close()


def test_only_so_many_jobs_wait() -> None:
    from threading import Event

    from engine.viewer.jobs import BusyError, Jobs

    jobs, begun, go = Jobs(), Event(), Event()

    def work(_: object) -> None:
        begun.set()
        go.wait()

    first = jobs.add("item", work)
    begun.wait()
    others = [jobs.add("item", work) for _ in range(4)]
    with pytest.raises(BusyError, match="at most 4"):
        jobs.add("item", work)
    go.set()
    jobs._queue.join()
    assert {job.state for job in (first, *others)} == {"done"}
    jobs.close()
