"""Requests and answers: what a page may ask, what an attacker may not, and that nothing from files becomes HTML."""

import json
import re
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import h5py
import numpy as np
import pytest

from engine.features.bag_writer import write_bag
from engine.viewer.app import App
from tests.support.known_bag import known_features, known_plan
from tests.support.known_picture import HEIGHT, WIDTH
from tests.support.known_view import (
    HOST,
    app_of,
    finished_run,
    get,
    only_item,
    post,
    previews_of,
    publish,
    run_at_work,
    said,
    slide_file,
)

TOKEN = "a-secret-of-30-letters-or-more"
NASTY = "<script>alert(1)<\\script> & 'q' \"d\" ü"


@pytest.fixture
def app(tmp_path: Path) -> App:
    return app_of(finished_run(tmp_path / "run"))


def test_all_that_the_page_needs_of_a_run(app: App) -> None:
    found = said(get(app, f"/item/{only_item(app)}"))
    assert (found["width"], found["height"], found["mpp"], found["synthetic"]) == (WIDTH, HEIGHT, 0.5, True)
    assert [layer["name"] for layer in found["layers"]] == ["picture", "guide"]
    assert found["may"] == {"redo": False, "pixels": False}
    (row,) = said(get(app, "/figures"))["items"]
    assert (row["seed"], row["agreement"], row["kind"]) == (7, 21.5, "run")


def test_a_tile_is_asked_for_once(app: App) -> None:
    item = only_item(app)
    layer = said(get(app, f"/item/{item}"))["layers"][0]
    tile = get(app, f"/dzi/{item}/picture/{layer['deepest']}/0_1.jpg?v={layer['version']}")
    assert (tile.status, tile.kind) == (200, "image/jpeg")
    assert "immutable" in tile.headers["Cache-Control"]
    again = get(app, f"/dzi/{item}/picture/11/0_1.jpg?v={layer['version']}", {"If-None-Match": tile.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")
    other = get(app, f"/dzi/{item}/picture/11/0_1.jpg?v=another")
    assert other.headers["Cache-Control"] == "no-cache"  # what stands under it may change


def test_a_damaged_tile_is_counted_and_never_kept(app: App) -> None:
    item = only_item(app)
    path = app.library.item(item).path / "image.ome.zarr" / "0" / "c" / "0" / "1" / "0"
    path.write_bytes(b"no chunk")
    version = said(get(app, f"/item/{item}"))["layers"][0]["version"]
    tile = get(app, f"/dzi/{item}/picture/11/0_1.jpg?v={version}")
    assert (tile.status, tile.headers["Cache-Control"], tile.headers["X-Damaged"]) == (200, "no-cache", "1")
    assert said(get(app, f"/item/{item}"))["damaged"] == 1


PATHS = [
    *(
        "/../../etc/passwd",
        "/static/../guard.py",
        "/static/..%2fguard.py",
        "/static/",
        "/static/LICENSE",
        "//etc/passwd",
    ),
    *("/dzi/ITEM/picture/11/../../../state.json", "/dzi/ITEM/%2e%2e/11/0_0.jpg", "/dzi/ITEM/picture/11/0_0.jpg/x"),
    *("/item/..", "/item/ITEM/..", "/item/%2e%2e%2f", "/geojson/ITEM/tissue", "/overlay/ITEM/..", "/report/ITEM"),
    *(
        "/thumb/nothing",
        "/job/1",
        "/state",
        "/state?item=../run",
        "/figures/x",
        "/item/" + "0" * 16,
        "/dzi/ITEM/x/1/0_0",
    ),
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_anywhere_else(app: App, path: str) -> None:
    answer = get(app, path.replace("ITEM", only_item(app)))
    assert answer.status in (404, 422)
    assert "problem" in said(answer)
    assert b"root:" not in answer.body


@pytest.mark.parametrize("place", ["a_b", "11", "0_0_0", "-1_0", "99999999999999999999_0", "1e3_0", ""])
def test_tiles_by_odd_numbers(app: App, place: str) -> None:
    assert get(app, f"/dzi/{only_item(app)}/picture/11/{place}.jpg").status in (404, 422)
    assert get(app, f"/dzi/{only_item(app)}/picture/x{place}/0_0.jpg").status in (404, 422)


@pytest.mark.parametrize("target", ["/", "/figures", "/nothing", "/static/viewer.js"])
def test_every_answer_binds_the_browser(app: App, target: str) -> None:
    for answer in (get(app, target), get(app, target, {"Host": "evil.example"}), post(app, target, b"{}")):
        assert "script-src 'self';" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.kind != "text/html; charset=utf-8" or target == "/"


def test_other_sites_get_nothing(app: App) -> None:
    item = only_item(app)
    for target in ("/figures", f"/item/{item}", f"/thumb/{item}", f"/state?item={item}"):
        assert get(app, target, {"Host": "evil.example:8765"}).status == 421
        assert get(app, target, {"Origin": "http://evil.example"}).status == 403
        assert get(app, target, {"Sec-Fetch-Site": "cross-site"}).status == 403


def test_the_page_runs_scripts_of_ours_alone() -> None:
    """No script, style or handler stands in the page, and the module never writes HTML."""

    class Found(HTMLParser):
        inline: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.inline += [f"{tag} {k}" for k, _ in attrs if k.startswith("on") or k == "style"]
            self.inline += (
                ["script"] if tag == "script" and not dict(attrs).get("src", "").startswith("/static/") else []
            )  # type: ignore[union-attr]

    static = files("engine.viewer").joinpath("static")
    page = Found()
    page.feed(static.joinpath("index.html").read_text())
    assert page.inline == []
    module = static.joinpath("viewer.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\.srcdoc", module
    )
    assert module.count("\n") <= 600


def test_names_of_files_are_text(tmp_path: Path) -> None:
    run_at_work(tmp_path / "runs" / NASTY)
    app = app_of(tmp_path / "runs")
    answer = get(app, "/figures")
    assert answer.kind == "application/json"
    assert said(answer)["items"][0]["name"] == NASTY
    assert said(get(app, f"/item/{only_item(app)}"))["name"] == NASTY


def test_a_command_is_one_that_a_shell_takes_whatever_the_run_is_called(tmp_path: Path) -> None:
    run = finished_run(tmp_path / 'it\'s; a "run" $(reboot)')
    app = app_of(run)
    command = said(get(app, f"/redo?item={only_item(app)}&box=1,2,30,40&seed=5"))["command"]
    typed = subprocess.run(["sh", "-c", "printf '%s\\n' " + command], capture_output=True, text=True, check=True)
    words = ["python", "generate_large.py", "--redo", "1,2,30,40", "--seed", "5", str(run)]
    assert typed.stdout.splitlines() == words


def test_nothing_is_sampled_unless_that_was_allowed(app: App, tmp_path: Path) -> None:
    item = only_item(app)
    asked = json.dumps({"item": item, "box": "0,0,100,100", "seed": 1}).encode()
    refused = post(app, "/redo", asked)
    assert (refused.status, "--allow-write" in said(refused)["problem"]) == (403, True)
    assert post(app, "/pixels", asked).status == 403
    shown = said(get(app, f"/redo?item={item}&box=0,0,100,100&seed=3"))
    assert shown == {
        "allowed": False,
        "command": f"python generate_large.py --redo 0,0,100,100 --seed 3 {tmp_path / 'run'}",
    }
    allowed = app_of(tmp_path / "run", allow_write=True)
    for body in (b"", b"[]", b"{}", b"nonsense", b"[" * 4000, json.dumps({"item": item, "box": "0,0,9999,1"}).encode()):
        assert post(allowed, "/redo", body).status in (404, 422)
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}):
        assert post(allowed, "/redo", asked, headers).status in (403, 421)
    assert get(allowed, "/redo", method="POST", body=asked).status == 403  # no Origin
    assert get(allowed, "/redo", {"Origin": f"http://{HOST}"}, method="DELETE").status == 405


def test_the_token(tmp_path: Path) -> None:
    app = app_of(finished_run(tmp_path / "run"), token=TOKEN)
    for target in ("/", "/figures", "/static/viewer.js", f"/item/{only_item(app)}", "/?token=wrong", "/?token="):
        assert get(app, target).status == 401
    let_in = get(app, f"/?token={TOKEN}&a=b")
    assert (let_in.status, let_in.headers["Location"]) == (303, "/?a=b")
    assert get(app, f"//evil.example?token={TOKEN}").headers["Location"] == "/"
    cookie = let_in.headers["Set-Cookie"].partition(";")[0]
    assert get(app, "/figures", {"Cookie": cookie}).status == 200
    assert get(app, "/figures", {"Authorization": f"Bearer {TOKEN}"}).status == 200
    assert post(app, "/geojson", b"[]").status == 401


def test_a_run_is_followed_until_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.viewer.app.LOOK_EVERY_S", 0.001)
    run = run_at_work(tmp_path / "run")
    app, previews = app_of(run), previews_of(run)
    answer = get(app, f"/state?item={only_item(app)}")
    assert answer.kind == "text/event-stream"
    assert answer.events is not None
    events = (json.loads(e.removeprefix(b"data: ")) for e in answer.events if e.startswith(b"data: "))
    assert next(events)["layers"] == []
    publish(previews, 0, 0.5)
    versions = {layer["name"]: layer["version"] for layer in next(e for e in events if e["layers"])["layers"]}
    assert set(versions) == {"live_20x", "live_10x"}
    publish(previews, 1, 0.4)
    assert any(layer["version"] != versions[layer["name"]] for layer in next(events)["layers"])
    (run / "state.json").unlink()
    assert [event for event in events if event.get("gone")]  # and the stream ends
    assert get(app, f"/item/{only_item(app)}").status == 410


def test_so_many_may_follow_and_each_makes_room(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    item, open_ = only_item(app), []
    while (answer := get(app, f"/state?item={item}")).status == 200:
        open_.append(answer.events)
    assert (answer.status, len(open_)) == (503, 128)
    open_.pop().close()
    assert get(app, f"/state?item={item}").status == 200


def test_a_slide_with_tissue_grid_and_without_scale(tmp_path: Path) -> None:
    app = app_of(slide_file(tmp_path / "s.tiff"))
    item = only_item(app)
    assert said(get(app, f"/item/{item}"))["overlays"] == ["tissue", "grid"]
    assert said(get(app, f"/overlay/{item}/tissue"))["shapes"]
    fine, coarse = said(get(app, f"/overlay/{item}/grid"))["scales"]
    assert (fine["name"], fine["tile"], coarse["name"], coarse["tile"]) == ("20x", [256, 256], "5x", [1024, 1024])
    out = get(app, f"/geojson/{item}/20x")
    assert (out.kind, len(said(out)["features"])) == ("application/geo+json", len(fine["at"]))
    assert len(said(post(app, "/geojson", out.body))["shapes"]) == len(fine["at"])
    plain = app_of(slide_file(tmp_path / "p.tiff", mpp=None))
    found = said(get(plain, f"/item/{only_item(plain)}"))
    assert (found["mpp"], found["overlays"]) == (None, [])
    assert get(plain, f"/overlay/{only_item(plain)}/tissue").status == 422
    given = app_of(tmp_path / "p.tiff", mpp=0.25)
    assert said(get(given, f"/item/{only_item(given)}"))["mpp"] == 0.25


def test_features_and_attention_of_a_slide(tmp_path: Path) -> None:
    slide_file(tmp_path / "slides" / "s.tiff")
    plan = known_plan(parents=1, slide="s", synthetic=True)
    folder = tmp_path / "extraction" / "features"
    folder.mkdir(parents=True)
    write_bag(folder / "s.h5", plan, known_features(plan))
    (tmp_path / "extraction" / "report.html").write_text("<script>alert(1)</script>")
    for fold, scale in enumerate((1.0, 3.0)):
        path = tmp_path / "study" / "folds" / f"repeat{fold}_fold0"
        path.mkdir(parents=True)
        with h5py.File(path / "attention.h5", "w") as file:
            group = file.create_group("s")
            group["attention"] = np.arange(16) * scale
            group["coords"] = plan.scales[0].coords
            group.attrs["tile_level0_px"] = (512.0, 512.0)
    app = app_of(tmp_path / "slides", features=str(tmp_path / "extraction"), mil=str(tmp_path / "study"))
    item = only_item(app)
    found = said(get(app, f"/item/{item}"))
    assert (found["overlays"], found["synthetic"], found["report"]) == (["tissue", "grid", "attention"], True, True)
    assert "16 tiles at 20x" in found["facts"]["features"]
    attention = said(get(app, f"/overlay/{item}/attention"))
    assert (attention["folds"], attention["top"][0], attention["values"][15]) == (2, 15, 30.0)
    assert (attention["ranks"][0], attention["ranks"][15]) == (0.0, 1.0)
    first, _ = said(get(app, f"/overlay/{item}/grid"))["scales"]
    assert first["at"] == plan.scales[0].coords.tolist()
    report = get(app, f"/report/{item}")
    assert "sandbox" in report.headers["Content-Security-Policy"]
    tiles = said(get(app, f"/geojson/{item}/attention"))["features"]
    assert tiles[15]["properties"]["measurements"] == {"attention": 30.0, "rank": 1.0}
