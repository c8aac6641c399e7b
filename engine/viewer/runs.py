"""A run as the viewer shows it: at work, its previews and how fast it is; finished, its picture, guide and figures.

The run is never locked and nothing in its folder is written. A run whose latents lie in a bucket is seen by its folder
here; only how far it is comes from the bucket. It does not know requests.
"""

import io
import json
import math
import os
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from engine.canvas.live_preview import PreviewFacts, read_facts, read_speed
from engine.canvas.run_state import RunState, load_state
from engine.canvas.storage import PREVIEWS
from engine.canvas.view import CanvasView
from engine.core.errors import CanvasError, EngineError
from engine.core.files import LOCK, lock_owner
from engine.core.lazy import file_stamp, opened
from engine.core.streaming import Box
from engine.core.units import LATENT_FACTOR
from engine.generation.finished_run import RECORD
from engine.generation.inpaint import InpaintConfig
from engine.generation.outputs import GUIDE, IMAGE, REPORT
from engine.generation.preview import check_region, find_picture, picture_size
from engine.images.ome_zarr import Image
from engine.viewer.places import Item, OutsideError
from engine.viewer.tiles import FlatPyramid, GoneError, OurPyramid, Pyramid, flat_picture

JSON_BYTES = 16 * 2**20
PREVIEW_BYTES = 16 * 2**20
STORE_EVERY_S = 5.0
"""A bucket is asked how far a run is at most so often."""
REFERENCES = ("reference.png", "enlarged_from.png")


@dataclass(frozen=True)
class Layer:
    """One picture of a run."""

    name: str
    title: str
    version: str
    """Changes when the picture does; it stands in every tile's address."""
    pyramid: Pyramid
    live: PreviewFacts | None = None


@dataclass(eq=False)
class RunView:
    """One run folder."""

    item: Item
    _previews: OrderedDict[tuple[str, int, int], FlatPyramid] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _asked: tuple[float, RunState] | None = None
    _held: set[str] = field(default_factory=set)
    _found: tuple[str, list[Layer]] = ("", [])

    def state(self) -> RunState:
        """Return how far the run is. Raises: GoneError; EngineError."""
        path = self.item.path / "state.json"
        if not path.is_file():
            raise GoneError(f"{self.item.path} is gone; it was removed while it was viewed.")
        home = load_state(self.item.inside(path))
        if home.store is None or home.progress.finished:
            return home
        if self._asked is None or time.monotonic() - self._asked[0] >= STORE_EVERY_S:
            self._asked = time.monotonic(), CanvasView(self.item.path).state
        there = self._asked[1]
        return home if home.commits >= there.commits else replace(there, store=home.store)

    def signature(self) -> str:
        """Return what changes whenever there is something new to show."""
        said = []
        for name in ("state.json", PREVIEWS, REPORT, GUIDE, f"{IMAGE}/zarr.json", RECORD, *REFERENCES):
            try:
                facts = (self.item.path / name).stat()
                said.append(f"{facts.st_mtime_ns}-{facts.st_ino}")
            except OSError:
                said.append("none")
        return " ".join(said)

    def progress(self) -> dict[str, Any]:
        """Return how far and how fast the run is, for people. Raises: GoneError; EngineError."""
        state = self.state()
        now, speed = state.progress, read_speed(self.item.path)
        said: dict[str, Any] = {
            "finished": now.finished, "pass": now.pass_index + 1, "step": now.steps, "decoded_px": now.decoded_px,
            "height": picture_size(state)[0], "commits": state.commits, "store": state.store,
        }  # fmt: skip
        if speed is not None:
            said |= {
                "pass_name": speed.pass_name, "steps": speed.steps, "step": max(speed.step, 0),
                "tiles_per_s": speed.tiles_per_s, "remaining_s": speed.remaining_s, "replicas": speed.replicas,
                "age_s": max(time.time() - speed.at, 0.0),
            }  # fmt: skip
        alive = self._alive()
        said["alive"] = None if now.finished else alive
        return said

    def _alive(self) -> bool | None:
        """Say whether the process that holds the run's lock lives; None where that cannot be told from here."""
        try:
            owner = lock_owner(self.item.inside(self.item.path / LOCK))
        except (OSError, OutsideError):
            return None
        if owner is None or owner[1] != socket.gethostname():
            return None
        try:
            os.kill(owner[0], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def layers(self) -> list[Layer]:
        """Return the pictures that are there now, the run's own first. Raises: GoneError; EngineError."""
        now = self.signature()  # a tile asks for one of them: they are looked up again only when a file changed
        if self._found[0] != now:
            self._found = now, self._look()
        return self._found[1]

    def _look(self) -> list[Layer]:
        state, folder = self.state(), self.item.path
        found: list[Layer] = []
        picture = self._picture(folder)
        if picture is not None:
            found.append(Layer("picture", "picture", _stamp(folder / IMAGE), picture))
        live = sorted(self._live(picture_size(state)), key=lambda layer: -(layer.live.width if layer.live else 0))
        finest = next((p for p in live if p.live and p.live.reduced == 1), None) if picture is None else None
        if finest is not None:
            found.append(finest)
        if (folder / GUIDE).is_file():
            guide, size = self._flat(folder / GUIDE), picture_size(state)
            factor = 2 ** max(0, round(math.log2(max(size) / max(guide.size))))  # levels halve
            found.append(Layer("guide", "guide", _stamp(folder / GUIDE), _over(guide, size, factor)))
        else:
            found += [layer for layer in live if layer is not finest and picture is None]
        for name in REFERENCES:
            if (folder / name).is_file():
                found.append(Layer("reference", "reference", _stamp(folder / name), self._flat(folder / name)))
        parent = self._parent()
        before = None if parent is None else self._picture(parent)
        if parent is not None and before is not None:
            found.append(Layer("before", "before the redo", _stamp(parent / IMAGE), before))
        return found

    def _picture(self, folder: Path) -> Pyramid | None:
        self.item.inside(folder / "state.json")
        try:
            if find_picture(folder) is None:
                return None
        except CanvasError as error:
            if not (folder / "state.json").is_file():
                raise GoneError(f"{folder} is gone; it was removed while it was viewed.") from error
            raise
        stamp = file_stamp(folder / IMAGE)
        if str(stamp) not in self._held:
            self.item.hold(folder / IMAGE)
            self._held.add(str(stamp))
        return OurPyramid(opened(("view", stamp), partial(Image.open, folder / IMAGE)))

    def _live(self, size: tuple[int, int]) -> list[Layer]:
        """Return the previews of the run; files that are none are passed over."""
        found = []
        for path in sorted((self.item.path / PREVIEWS).glob("*.jpg"))[:16]:
            self.item.inside(path)
            try:
                data = path.read_bytes() if path.stat().st_size <= PREVIEW_BYTES else b""
                stamp = file_stamp(path)
            except (OSError, EngineError):
                continue
            facts = read_facts(data)
            if facts is None:
                continue
            version = f"{facts.pass_name}-{facts.step}-{stamp[1] % 10**9}".replace(" ", "_")
            pyramid = self._kept(stamp, data)
            if pyramid is not None:
                pyramid = _over(pyramid, size, facts.reduced * LATENT_FACTOR * facts.factor)
                found.append(Layer(f"live_{facts.level}", f"{facts.level}, at work", version, pyramid, facts))
        return found

    def _kept(self, stamp: tuple[str, int, int], data: bytes | None = None) -> FlatPyramid | None:
        """Return a small picture, decoded once per state of its file; the last few are kept."""
        with self._lock:
            if stamp not in self._previews:
                try:
                    if data is None:
                        self._previews[stamp] = FlatPyramid(flat_picture(Path(stamp[0])))
                    else:
                        with PIL.Image.open(io.BytesIO(data)) as picture:
                            self._previews[stamp] = FlatPyramid(np.asarray(picture.convert("RGB")))
                except (OSError, ValueError, SyntaxError):
                    if data is None:
                        raise
                    return None
            self._previews.move_to_end(stamp)
            while len(self._previews) > 6:
                self._previews.popitem(last=False)
            return self._previews[stamp]

    def _flat(self, path: Path) -> FlatPyramid:
        self.item.inside(path)
        found = self._kept(file_stamp(path))
        assert found is not None  # it raises
        return found

    def _parent(self) -> Path | None:
        """Return the run that this one is a redo of, where it may be shown."""
        path = self.item.path / RECORD
        try:
            parent = self.item.path / str(_record(self.item.inside(path))["run"])
            return self.item.inside(parent) if (parent / "state.json").is_file() else None
        except (OutsideError, KeyError):
            return None

    def figures(self) -> dict[str, Any]:
        """Return what is known of the run for tables: seed, size, texts, scores of its report; None for unknown."""
        state, report = self.state(), _record(self.item.inside(self.item.path / REPORT))
        height, width = picture_size(state)
        detail, texts = report.get("detail"), state.keys.get("text_regions")
        said: dict[str, Any] = {
            "seed": state.keys.get("redo.seed", state.keys.get("sampling.seed")),
            "width": width, "height": height, "finished": state.progress.finished,
            "seam": _number(report.get("seam_score")), "agreement": _number(report.get("consistency_psnr_db")),
            "detail": _number(detail.get("gradient")) if isinstance(detail, dict) else None,
            "tiles_per_s": _number(report.get("tiles_per_s")), "dtype": state.keys.get("model.dtype"),
            "redo": state.keys.get("redo.region"),
            "caption": "; ".join(map(str, texts)) if isinstance(texts, list) else None,
        }  # fmt: skip
        quality = _record(self.item.inside(self.item.path / "quality.json"))
        rows = quality.get("figures")
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict) and str(row.get("name", "")).lower().startswith("kid"):
                said["kid"] = _number(row.get("value"))
        return said

    def mpp(self, layers: list[Layer]) -> float | None:
        """Return µm/px of the picture, as it is written or as the run at work says; None before its first step."""
        for layer in layers:
            if layer.name == "picture" and isinstance(layer.pyramid, OurPyramid):
                return layer.pyramid.image.mpp_um
        return next((layer.live.mpp for layer in layers if layer.live is not None), None)

    def redo(self, box: Box, seed: int) -> InpaintConfig:
        """Return what samples a region (px) of the finished run again. Raises: EngineError."""
        state = self.state()
        if not state.progress.finished:
            raise EngineError(f"{self.item.name} must be finished before a part of it is sampled again. Wait for it.")
        try:
            check_region(box, picture_size(state))
            return InpaintConfig(str(self.item.path), ",".join(map(str, box.xywh)), seed)
        except ValueError as error:
            raise EngineError(str(error)) from error


def _over(shown: FlatPyramid, size: tuple[int, int], factor: int) -> FlatPyramid:
    """Return the part of a picture that lies over a canvas of `size` px; a px of it covers `factor` of those."""
    height, width = (-(-side // factor) for side in size)
    return FlatPyramid(shown.pixels[:height, :width])


def _stamp(path: Path) -> str:
    return f"{file_stamp(path)[1]:x}"


def _record(path: Path) -> dict[str, Any]:
    """Return a small JSON object; an absent, large or damaged one is empty."""
    try:
        if path.stat().st_size > JSON_BYTES:
            return {}
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _number(value: object) -> float | None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ok else None  # type: ignore[arg-type]
