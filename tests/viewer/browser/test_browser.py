"""The page in a real browser: Chromium without a head, driven by Playwright; skipped where either is missing.

Every test also holds that no request failed, that nothing was written to the console and that no script raised.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.viewer.config import ViewConfig
from engine.viewer.server import ViewServer, running
from tests.support.known_picture import HEIGHT, WIDTH
from tests.support.known_view import caption, finish, finished_run, previews_of, publish, run_at_work, slide_file

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
SWITCHES = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync"),
]
PATIENCE_MS = 60_000
MIDDLE = """(n) => { // the colour in the middle of a picture as it is drawn
    const from = window.viewerPanes[n].viewer.drawer.canvas, to = document.createElement("canvas");
    to.width = to.height = 1;
    const pen = to.getContext("2d", { willReadFrequently: true });
    pen.drawImage(from, -Math.floor(from.width / 2), -Math.floor(from.height / 2));
    return [...pen.getImageData(0, 0, 1, 1).data]; }"""
DESK, PHONE = (1280, 800), (390, 844)
SHOTS = os.environ.get("VIEWER_SCREENSHOTS")
"""Folder to keep screenshots in; None keeps none."""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, headless=True, args=SWITCHES
        )
        context.set_default_timeout(PATIENCE_MS)
        yield context
        context.close()


class Seen:
    """A page, and all that went wrong on it."""

    def __init__(self, page: Any) -> None:
        self.page, self.faults, self.tiles = page, [], []
        page.on("console", lambda message: self.faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        page.on("requestfailed", lambda request: self._failed(request))
        page.on("response", self._answered)

    def _failed(self, request: Any) -> None:
        if "ERR_ABORTED" not in str(request.failure):  # left by the page itself, as when a view is closed
            self.faults.append(f"failed: {request.url} {request.failure}")

    def _answered(self, response: Any) -> None:
        if response.status >= 400:
            self.faults.append(f"{response.status}: {response.url}")
        if "/dzi/" in response.url:
            self.tiles.append(response.url)

    def colour(self, pane: int = 0) -> np.ndarray:
        """Return the colour in the middle of a picture as it is drawn, (3,)."""
        return np.array(self.page.evaluate(f"(n) => ({MIDDLE})(n)", pane)[:3])

    def place(self, pane: int = 0) -> dict[str, float]:
        return self.page.evaluate("(n) => window.viewerPanes[n].place()", pane)

    def until(self, script: str, argument: object = None) -> None:
        self.page.wait_for_function(script, arg=argument, timeout=PATIENCE_MS)

    def drawn(self, layer: str = "picture", pane: int = 0) -> None:
        """Wait until a layer is there with all tiles that it needs."""
        self.until("([n, name]) => window.viewerPanes[n].layers.get(name)?.image?.getFullyLoaded()", [pane, layer])

    def shot(self, name: str) -> None:
        if SHOTS is not None:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(SHOTS) / f"{name}.png")


Open = Callable[..., Seen]


@pytest.fixture
def opened(chromium: Any) -> Iterator[Open]:
    """Open an address at a size; in the end nothing went wrong on any page."""
    pages: list[Seen] = []

    def open_(url: str, size: tuple[int, int] = DESK, scheme: str = "light") -> Seen:
        page = chromium.new_page()
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.emulate_media(color_scheme=scheme)
        pages.append(Seen(page))
        page.goto(url)
        return pages[-1]

    yield open_
    faults = [fault for seen in pages for fault in seen.faults]
    for seen in pages:
        seen.page.close()
    assert faults == []


@pytest.fixture
def cohort(tmp_path: Path) -> Iterator[ViewServer]:
    for name in ("first <b>run<b>", "second 'run'"):
        finished_run(tmp_path / name)
    caption(tmp_path / "second 'run'", "stroma", "much <b>fat")
    slide_file(tmp_path / "slides" / "s.tiff")
    with running(ViewConfig(str(tmp_path), port=0)) as server:
        yield server


def id_of(server: ViewServer, part: str) -> str:
    return next(item.id for item in server.app.library.items if part in item.name)


def test_a_run_from_its_first_step_to_its_picture(tmp_path: Path, opened: Open) -> None:
    """Tiles change between two steps; the finished picture replaces the live one without reloading."""
    run = run_at_work(tmp_path / "run")
    previews = previews_of(run)
    with running(ViewConfig(str(run), port=0)) as server:
        seen = opened(server.url)
        seen.until("() => document.getElementById('progress').textContent.includes('At work')")
        publish(previews, 0, -0.5)
        seen.drawn("live_20x")
        seen.until("() => document.getElementById('progress').textContent.includes('step 1 of 8')")
        seen.shot("live")
        first = set(seen.tiles)
        assert abs(seen.colour() - 64).max() < 6
        assert "Synthetic" in seen.page.inner_text("#stage-a")
        assert seen.page.is_visible("#synthetic")
        publish(previews, 1, 0.5)
        seen.until("() => document.getElementById('progress').textContent.includes('step 2 of 8')")
        seen.until(f"() => Math.abs(({MIDDLE})(0)[0] - 191) < 6")
        assert set(seen.tiles) - first  # other addresses: the step stands in each
        finish(run)
        seen.drawn("picture")
        seen.until("() => document.getElementById('progress').hidden")
        assert [*seen.page.evaluate("[...window.viewerPanes[0].layers.keys()]")] == ["picture", "guide"]
        assert "50 µm" in seen.page.inner_text("#stage-a .scale") or "100 µm" in seen.page.inner_text("#stage-a .scale")
        seen.page.close()


def test_a_run_that_died_and_one_that_is_deleted(tmp_path: Path, opened: Open) -> None:
    run = run_at_work(tmp_path / "run", 1, process=2**22 - 3)  # above what Linux gives by default
    with running(ViewConfig(str(run), port=0)) as server:
        seen = opened(server.url)
        seen.until("() => document.getElementById('progress').textContent.includes('Stopped')")
        shutil.rmtree(run)
        seen.until("() => document.getElementById('message').textContent.includes('is gone')")
        assert not seen.page.is_hidden("#message")
        seen.page.close()


def test_the_contact_sheet(cohort: ViewServer, opened: Open) -> None:
    seen = opened(cohort.url)
    seen.until("() => document.querySelectorAll('#cards li').length === 3")
    names = [text.splitlines()[0] for text in seen.page.locator("#cards a").all_inner_texts()]
    assert names == ["first <b>run<b>", "second 'run'", "slides/s.tiff"]  # text, not HTML
    assert seen.page.locator("#cards b").count() == 0
    assert "21.5" in seen.page.locator("#cards li").first.inner_text()
    seen.shot("sheet")
    seen.page.fill("#filter", "slide")
    seen.until("() => document.querySelectorAll('#cards li').length === 1")
    seen.page.fill("#filter", "much lung")
    seen.until("() => document.querySelectorAll('#cards li').length === 0")
    seen.page.fill("#filter", "stroma <b>fat")
    seen.until("() => document.querySelectorAll('#cards li').length === 1")
    assert "stroma; much <b>fat" in seen.page.locator("#cards li").first.inner_text()
    seen.page.fill("#filter", "seed=7")
    seen.until("() => document.querySelectorAll('#cards li').length === 2")
    for box in seen.page.locator("input[name=chosen]").all():
        box.check()
    seen.page.click("#pair")
    seen.drawn("picture", 1)
    assert seen.page.is_visible("#stage-b")


def test_linked_zoom(cohort: ViewServer, opened: Open) -> None:
    """Two pictures show as many µm per px, at the same place, whoever is moved."""
    first, second = id_of(cohort, "first"), id_of(cohort, "s.tiff")
    seen = opened(f"{cohort.url}#item={first}&beside={second}&at=450,650,0.5")
    seen.drawn("picture", 0)
    seen.drawn("picture", 1)
    seen.until("() => Math.abs(window.viewerPanes[1].place().z - 0.5) < 0.01")
    seen.shot("side_by_side")
    seen.page.focus("#stage-a")
    seen.page.keyboard.press("+")
    seen.until("() => Math.abs(window.viewerPanes[0].place().z - 1 / 3) < 0.005")
    seen.until("() => Math.abs(window.viewerPanes[1].place().z - 1 / 3) < 0.005")
    seen.page.hover("#stage-b")
    seen.page.mouse.down()
    seen.page.mouse.up()
    for _ in range(8):
        seen.page.keyboard.press("ArrowRight")
    seen.until("""() => { const [a, b] = window.viewerPanes.map((pane) => pane.place().x / pane.item.width);
        return a > 0.55 && Math.abs(a - b) < 0.01; }""")
    assert [round(seen.place(pane)["z"], 2) for pane in (0, 1)] == [0.33, 0.33]


def test_layers_by_keyboard_and_the_address(cohort: ViewServer, opened: Open) -> None:
    item = id_of(cohort, "s.tiff")
    seen = opened(f"{cohort.url}#item={item}")
    seen.drawn("picture")
    seen.page.focus("#stage-a")
    seen.page.keyboard.press("2")
    seen.page.keyboard.press("3")
    seen.until("() => [...window.viewerPanes[0].shapes.values()].every((shape) => shape.on && shape.data)")
    seen.page.keyboard.press("+")
    seen.page.keyboard.press("ArrowDown")
    seen.until("() => location.hash.includes('tissue') && location.hash.includes('grid')")
    seen.page.wait_for_timeout(1000)  # the flight and the address that follows it
    seen.shot("slide")
    place, address = seen.place(), seen.page.url
    again = opened(address)
    again.drawn("picture")  # before it there are no shapes, of which "every" holds
    again.until("() => [...window.viewerPanes[0].shapes.values()].every((shape) => shape.on && shape.data)")
    assert again.place()["z"] == pytest.approx(place["z"], rel=0.01)
    assert again.place()["y"] == pytest.approx(place["y"], abs=3)
    link = again.page.locator("#exports a").first
    assert link.get_attribute("href") == f"/geojson/{item}/tissue"


def test_geojson_comes_in_and_a_large_one_does_not(cohort: ViewServer, opened: Open, tmp_path: Path) -> None:
    seen = opened(f"{cohort.url}#item={id_of(cohort, 's.tiff')}")
    seen.drawn("picture")
    ring = [[100, 100], [500, 100], [500, 500], [100, 100]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    path = tmp_path / "<img src=x onerror=alert(1)>.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    seen.page.set_input_files("#geojson", path)
    seen.until("() => document.getElementById('layers').textContent.includes('onerror')")
    assert seen.page.locator("#layers img").count() == 0
    large = tmp_path / "large.geojson"
    with large.open("wb") as file:
        file.truncate(33 * 2**20)
    seen.page.set_input_files("#geojson", large)
    seen.until("() => document.getElementById('message').textContent.includes('at most 32 MiB')")


def test_a_box_and_its_command(cohort: ViewServer, opened: Open) -> None:
    item = id_of(cohort, "second")
    seen = opened(f"{cohort.url}#item={item}&at=450,650,1.7")
    seen.drawn("picture")
    frame = seen.page.locator("#stage-a").bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    seen.page.keyboard.press("b")
    seen.page.mouse.move(x, y)
    seen.page.mouse.down()
    seen.page.mouse.move(x + 60, y + 40, steps=5)
    seen.page.mouse.move(x + 100, y + 80, steps=5)
    seen.page.mouse.up()
    box = seen.page.evaluate("window.viewerPanes[0].box")
    assert box == pytest.approx([450, 650, 170, 136], abs=4)
    seen.page.fill("#seed", "11")
    seen.page.click("#redo")
    seen.until("() => !document.getElementById('command').hidden")
    words = seen.page.inner_text("#command")
    assert words.startswith(f"python generate_large.py --redo {','.join(map(str, box))} --seed 11 '")
    assert seen.page.is_hidden("#run")
    seen.shot("box")
    seen.page.keyboard.press("Escape")
    seen.page.fill("#bx", "10")
    seen.page.keyboard.press("Tab")
    seen.until("() => window.viewerPanes[0].box?.[0] === 10")


def test_before_and_after_with_a_curtain(tmp_path: Path, opened: Open) -> None:
    finished_run(tmp_path / "run")
    redo = finished_run(tmp_path / "redo")
    (redo / "redo.json").write_text(json.dumps({"run": "../run"}))
    with running(ViewConfig(str(tmp_path), port=0)) as server:
        seen = opened(f"{server.url}#item={id_of(server, 'redo')}&on=picture:100,before:100")
        seen.drawn("before")
        seen.until("() => !document.getElementById('curtain-row').hidden")
        edge = "window.viewerPanes[0].layers.get('before').image.getClip().width"
        half = seen.page.evaluate(edge)
        seen.page.fill("#curtain", "25")
        assert seen.page.evaluate(edge) < half
        seen.page.close()


def test_the_token(tmp_path: Path, opened: Open, chromium: Any) -> None:
    token = "a-secret-of-30-letters-or-more"
    with running(ViewConfig(str(finished_run(tmp_path / "run")), port=0, token=token)) as server:
        page = chromium.new_page()
        assert page.goto(server.url).status == 401
        page.close()
        seen = opened(f"{server.url}?token={token}")
        seen.drawn("picture")
        assert "token" not in seen.page.url
        assert token not in json.dumps(chromium.cookies())
        seen.page.close()


def test_a_picture_without_scale_says_so(tmp_path: Path, opened: Open) -> None:
    with running(ViewConfig(str(slide_file(tmp_path / "s.tiff", mpp=None)), port=0)) as server:
        seen = opened(server.url)
        seen.drawn("picture")
        assert "µm/px is not stated" in seen.page.inner_text("#stage-a .scale")
        assert seen.page.locator("#stage-a .scale i").count() == 0
        seen.page.close()


def test_damaged_tiles_are_counted(tmp_path: Path, opened: Open) -> None:
    run = finished_run(tmp_path / "run")
    for chunk in (run / "image.ome.zarr").glob("[0-9]/c/0/0/0"):
        chunk.write_bytes(b"no chunk")
    with running(ViewConfig(str(run), port=0)) as server:
        seen = opened(server.url)
        seen.drawn("picture")
        seen.page.reload()
        seen.until("() => document.querySelector('#stage-a .label').textContent.includes('damaged tile')")
        assert "damaged tile" in seen.page.inner_text("#stage-a .label")
        seen.page.close()


def test_a_snapshot_is_a_png_of_the_field(cohort: ViewServer, opened: Open, tmp_path: Path) -> None:
    from PIL import Image

    seen = opened(f"{cohort.url}#item={id_of(cohort, 'second')}")
    seen.drawn("picture")
    with seen.page.expect_download() as download:
        seen.page.click("#snap")
    path = tmp_path / "snap.png"
    download.value.save_as(path)
    assert download.value.suggested_filename.endswith(f"_{WIDTH // 2}_{HEIGHT // 2}.png")
    frame = seen.page.locator("#stage-a").bounding_box()
    with Image.open(path) as picture:
        assert picture.size == (round(frame["width"]), round(frame["height"]))
        dark = np.asarray(picture.convert("L"))[-40:, :240] < 80
    assert dark.any()  # the bar and its letters


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_at_any_size(cohort: ViewServer, opened: Open, size: tuple[int, int], scheme: str) -> None:
    """No sideways scrolling at 1280 and 390 px, nor with letters of twice the size."""
    for place in ("", f"#item={id_of(cohort, 'first')}"):
        seen = opened(cohort.url + place, size, scheme)
        if place:
            seen.drawn("picture")
        else:
            seen.until("() => document.querySelectorAll('#cards li').length === 3")
        seen.shot(f"{'view' if place else 'sheet'}_{size[0]}_{scheme}")
        for letters in ("100%", "200%"):
            seen.page.evaluate("(size) => { document.documentElement.style.fontSize = size; }", letters)
            wide = seen.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0
        seen.shot(f"{'view' if place else 'sheet'}_{size[0]}_{scheme}_200")


def test_all_controls_are_reached_by_tab(cohort: ViewServer, opened: Open) -> None:
    seen = opened(f"{cohort.url}#item={id_of(cohort, 'first')}")
    seen.drawn("picture")
    reached = set()
    for _ in range(60):
        seen.page.keyboard.press("Tab")
        reached.add(seen.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"home", "fit", "power", "box", "snap", "full", "keys", "stage-a", "bx", "from-view", "other"} <= reached
