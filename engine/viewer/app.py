"""Requests to answers: the page and its files, tiles, figures, shapes, events, and work where that is allowed.

Pure but for the jobs: a request in, an answer out, so that a test needs no socket. Every answer is bounded, names of
files never come from the browser, and what users' files say leaves as JSON, which the page shows as text.
"""

import hashlib
import json
import re
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from engine import __version__
from engine.core.errors import EngineError
from engine.core.streaming import Box
from engine.generation.inpaint import InpaintConfig
from engine.viewer.guard import Guard
from engine.viewer.jobs import BusyError, Jobs, redo_words
from engine.viewer.library import Library, layer_facts
from engine.viewer.runs import Layer, RunView
from engine.viewer.shapes import LARGEST_BYTES, read_shapes, too_large
from engine.viewer.slides import SlideView
from engine.viewer.tiles import GoneError, Tile

STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "/static/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
    "/static/openseadragon.min.js": ("openseadragon.min.js", "text/javascript; charset=utf-8"),
}
COMMAND_BYTES = 4096
"""Of a request that starts work."""
LOOK_EVERY_S, ALIVE_EVERY = 0.5, 30
"""How often a run's files are looked at for the page, and after how many looks without news a line is sent."""
MOST_LISTENERS = 128
_JPEG = "image/jpeg"
_PLACE = re.compile(r"([0-9]{1,3})/([0-9]{1,9})_([0-9]{1,9})(?:\.jpg)?")


@dataclass(frozen=True)
class Request:
    """What a browser asks."""

    method: str
    target: str
    """Path and query, as sent."""
    headers: Mapping[str, str]
    body: Callable[[], bytes] = bytes
    """Reads what was sent; its length was checked before (`App.limit`)."""

    @cached_property
    def path(self) -> str:
        return urlsplit(self.target).path

    @cached_property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))


@dataclass(frozen=True)
class Answer:
    """What it gets."""

    status: int
    body: bytes = b""
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    events: Iterator[bytes] | None = None
    """A stream instead of a body."""


class App:
    """Answers the requests to one viewer."""

    def __init__(self, library: Library, guard: Guard, jobs: Jobs) -> None:
        self.library, self.guard, self.jobs = library, guard, jobs
        self.stopping = threading.Event()
        self._listeners = threading.BoundedSemaphore(MOST_LISTENERS)

    def limit(self, request: Request) -> int:
        """Return how many bytes a request may send."""
        return LARGEST_BYTES if request.path == "/geojson" else COMMAND_BYTES

    def too_long(self, request: Request, length: int) -> Answer:
        """Answer a request that wants to send more than that, before any of it is read."""
        said = str(too_large(length)) if request.path == "/geojson" else "the request is too long."
        return self._with_headers(_problem(413, said))

    def answer(self, request: Request) -> Answer:
        """Return the answer; whatever is wrong with the request or the files is said in it."""
        reads = request.method in ("GET", "HEAD")
        refusal = self.guard.refusal(request.headers, writes=not reads, opens_page=reads and request.path == "/")
        if refusal is not None:
            return self._with_headers(_problem(*refusal))
        if self.guard.token is not None and (found := self._let_in(request)) is not None:
            return self._with_headers(found)
        try:
            found = self._read(request) if reads else self._do(request)
        except LookupError:
            found = _problem(404, "there is no such thing here.")
        except GoneError as error:
            found = _problem(410, str(error))
        except BusyError as error:
            found = _problem(429, str(error))
        except (EngineError, OSError, ValueError, RecursionError) as error:  # the last: JSON that is nested deeply
            found = _problem(422, str(error))
        return self._with_headers(found, report=request.path.startswith("/report/"))

    def _with_headers(self, answer: Answer, report: bool = False) -> Answer:
        headers = {"Cache-Control": "no-store", **self.guard.headers(report), **answer.headers}
        return Answer(answer.status, answer.body, answer.kind, headers, answer.events)

    def _let_in(self, request: Request) -> Answer | None:
        """Return what a request without the right token gets; one with it in its address gets a cookie."""
        given = request.query.get("token")
        if given is not None and self.guard.is_token(given):
            rest = urlencode({k: v for k, v in request.query.items() if k != "token"})
            place = request.path if request.path in STATIC else "/"
            return Answer(303, headers={"Location": f"{place}?{rest}" if rest else place,
                                        "Set-Cookie": self.guard.cookie})  # fmt: skip
        if self.guard.knows(request.headers):
            return None
        return _problem(401, "the address must carry the viewer's token: open /?token=… as printed by the command.")

    def _read(self, request: Request) -> Answer:
        path = request.path
        if path in STATIC:
            return self._static(request, *STATIC[path])
        name, *rest = path.removeprefix("/").split("/")
        if name == "dzi" and len(rest) == 4:
            return self._tile(request, rest)
        if name == "state" and not rest:
            return self._events(request.query.get("item", ""))
        if name == "figures" and not rest:
            return self._figures()
        if name == "redo" and not rest:
            return self._redo_command(request.query)
        readers = {"item": self._item, "thumb": self._thumbnail, "report": self._report, "job": self._job}
        if name in readers and len(rest) == 1:
            return readers[name](request, rest[0])
        if name in ("overlay", "geojson") and len(rest) == 2:
            view = self.library.view(rest[0])
            if not isinstance(view, SlideView):
                raise LookupError(rest[0])
            if name == "overlay":
                return _json(view.overlay(rest[1]))
            kept = {"Content-Disposition": f'attachment; filename="{rest[0]}_{rest[1]}.geojson"'}
            return Answer(200, json.dumps(view.geojson(rest[1])).encode(), "application/geo+json", kept)
        raise LookupError(path)

    def _do(self, request: Request) -> Answer:
        """Answer a POST."""
        if request.method != "POST":
            return _problem(405, "GET, HEAD and POST are what is understood.")
        if request.path == "/geojson":
            with self.library.makers.turn():
                return _json(read_shapes(request.body()))
        asked = json.loads(request.body())
        if not isinstance(asked, dict):
            raise ValueError("the request must be a JSON object.")
        if request.path == "/redo":
            if not self.guard.allow_write:
                return _problem(403, "nothing is sampled from here: start the viewer with --allow-write.")
            item = self.library.item(str(asked.get("item")))
            region = self._redo({k: str(v) for k, v in asked.items()})
            return _json(self.jobs.add(item.id, self.jobs.redo(region, lambda p: self.library.add(p).id)).said())
        if request.path == "/pixels":
            model = self.library.config.model
            if model is None:
                return _problem(403, "no model was named: start the viewer with --model.")
            item = self.library.item(str(asked.get("item")))
            if item.kind != "run":
                raise LookupError(item.id)
            box = Box.parse(str(asked.get("box")))
            return _json(self.jobs.add(item.id, self.jobs.pixels(item.path, model, box)).said())
        raise LookupError(request.path)

    def _static(self, request: Request, name: str, kind: str) -> Answer:
        data = files("engine.viewer").joinpath("static", name).read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        return Answer(304, headers=headers) if _has(request, tag) else Answer(200, data, kind, headers)

    def _tile(self, request: Request, rest: list[str]) -> Answer:
        """Answer /dzi/ITEM/LAYER/DEPTH/COLUMN_ROW?v=VERSION."""
        name, layer, depth, place = rest
        match = _PLACE.fullmatch(f"{depth}/{place}")
        if match is None:
            raise LookupError(place)
        where = int(match[1]), int(match[2]), int(match[3])
        if layer.startswith("pixels_"):
            pixels = self.jobs.job(layer.removeprefix("pixels_")).pixels
            if pixels is None:
                raise LookupError(layer)
            tile, version = pixels.tile(*where), layer
        else:
            tile, version = self.library.tile(name, layer, where)
        return _picture(request, tile, f"{version}/{layer}/{depth}/{place}", request.query.get("v") == version)

    def _thumbnail(self, request: Request, name: str) -> Answer:
        tile, version = self.library.thumbnail(name)
        return _picture(request, tile, f"{version}/thumb", False)

    def _item(self, request: Request, name: str) -> Answer:
        found = self.library.facts(name)
        may = {"redo": self.guard.allow_write, "pixels": self.library.config.model is not None}
        return _json(found | {"may": may})

    def _figures(self) -> Answer:
        self.library.refresh()
        left_out = self.library.left_out
        rows = self.library.figures()
        return _json({"version": __version__, "items": rows, "left_out": left_out, "root": self.library.config.path})

    def _report(self, request: Request, name: str) -> Answer:
        view = self.library.view(name)
        found = view.report() if isinstance(view, SlideView) else None
        if found is None:
            raise LookupError(name)
        return Answer(200, found, "text/html; charset=utf-8")

    def _job(self, request: Request, name: str) -> Answer:
        job = self.jobs.job(name)
        layer = None
        if job.pixels is not None:
            layer = layer_facts(Layer(f"pixels_{name}", "true px", f"pixels_{name}", job.pixels))
        return _json(job.said() | {"layer": layer})

    def _redo(self, asked: Mapping[str, str]) -> InpaintConfig:
        view = self.library.view(asked.get("item", ""))
        if not isinstance(view, RunView):
            raise EngineError("only a part of a run can be sampled again; this is none.")
        return view.redo(Box.parse(asked.get("box", "")), int(asked.get("seed", "1")))

    def _redo_command(self, asked: Mapping[str, str]) -> Answer:
        words = ["python", "generate_large.py", *redo_words(self._redo(asked))]
        return _json({"command": shlex.join(words), "allowed": self.guard.allow_write})

    def _events(self, name: str) -> Answer:
        view = self.library.view(name)
        if not isinstance(view, RunView):
            raise LookupError(name)
        if not self._listeners.acquire(blocking=False):
            return _problem(503, f"at most {MOST_LISTENERS} pages may follow runs at once; there are as many.")
        events = self._follow(name, view)
        return Answer(200, next(events), "text/event-stream", {"X-Accel-Buffering": "no"}, events)

    def _follow(self, name: str, view: RunView) -> Iterator[bytes]:
        """Yield the state of a run whenever it changes, until it is gone or the viewer stops."""
        try:
            last, quiet = "", 0
            yield b"retry: 2000\n\n"  # taken at once, so that whoever closes the stream comes by `finally`
            while True:
                try:
                    said = view.progress() | {"layers": [
                        {"name": one.name, "version": one.version} for one in view.layers()]}  # fmt: skip
                    said["damaged"] = self.library.makers.count(name)
                except GoneError as error:
                    yield _event({"gone": True, "problem": str(error)})
                    return
                except (EngineError, OSError) as error:
                    said = {"problem": str(error)}
                now = json.dumps({k: v for k, v in said.items() if k != "age_s"})
                quiet = 0 if now != last else quiet + 1
                if now != last:
                    yield _event(said)
                elif quiet % ALIVE_EVERY == 0:
                    yield b": still here\n\n"
                last = now
                if self.stopping.wait(LOOK_EVERY_S):
                    return
        finally:
            self._listeners.release()


def _event(said: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(said)}\n\n".encode()


def _json(said: Any) -> Answer:
    return Answer(200, json.dumps(said).encode())


def _problem(status: int, said: str) -> Answer:
    return Answer(status, json.dumps({"problem": said}).encode())


def _picture(request: Request, tile: Tile, said: str, forever: bool) -> Answer:
    """Answer with a tile; one whose address names its version need not be asked for again."""
    tag = f'"{hashlib.sha256(said.encode() + tile.data).hexdigest()[:16]}"'
    keep = "private, max-age=31536000, immutable" if forever and not tile.damaged else "no-cache"
    headers = {"ETag": tag, "Cache-Control": keep}
    if tile.damaged:
        headers["X-Damaged"] = "1"
    if _has(request, tag):
        return Answer(304, headers=headers)
    return Answer(200, tile.data, "image/png" if tile.data.startswith(b"\x89PNG") else _JPEG, headers)


def _has(request: Request, tag: str) -> bool:
    return tag in [one.strip() for one in request.headers.get("If-None-Match", "").split(",")]
