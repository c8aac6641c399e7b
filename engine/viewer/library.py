"""All items of one viewer: what each is, what it shows, what is known of it. Views of the last few are kept open.

It is what requests are answered from; it knows no HTTP.
"""

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.core.errors import EngineError
from engine.core.lazy import file_stamp, opened
from engine.images.dzi import PROVENANCE_FILE, tiles_folder
from engine.images.ome_zarr import Image
from engine.viewer.config import ViewConfig
from engine.viewer.places import Item, item_of, look
from engine.viewer.runs import Layer, RunView
from engine.viewer.slides import SlideView
from engine.viewer.tiles import DeepZoom, GoneError, Makers, OurPyramid, Tile

THUMBNAIL_PX = 128
"""Longer side of a thumbnail at least, where the picture has as many px."""
KEPT = 32
"""Views that are kept open."""


@dataclass(eq=False)
class PictureView:
    """An OME-Zarr of ours or a Deep Zoom picture: one layer."""

    item: Item

    def layers(self) -> list[Layer]:
        """Return its one layer. Raises: GoneError; EngineError."""
        path = self.item.path
        if not path.exists():
            raise GoneError(f"{path} is gone; it was removed while it was viewed.")
        stamp = file_stamp(path)
        if self.item.kind == "dzi":
            pyramid = opened(("view", stamp), partial(DeepZoom.open, self.item))
        else:
            pyramid = OurPyramid(opened(("view", stamp), self._image))
        return [Layer("picture", "picture", f"{stamp[1]:x}", pyramid)]

    def _image(self) -> Image:
        self.item.hold(self.item.path)
        return Image.open(self.item.path)


View = RunView | SlideView | PictureView


class Library:
    """The items of one viewer."""

    def __init__(self, config: ViewConfig) -> None:
        """Raises: EngineError when there is nothing to show."""
        self.config = config
        self.makers = Makers()
        found = look(Path(config.path))
        self.left_out = found.left_out
        self._items = {item.id: item for item in found.items}
        self._views: OrderedDict[str, View] = OrderedDict()
        self._lock = threading.Lock()
        for name in ("features", "mil"):
            folder = getattr(config, name)
            if folder is not None and not Path(folder).is_dir():
                raise EngineError(f"{name} must be a folder; there is none at {folder}. Check the path.")

    @property
    def items(self) -> list[Item]:
        return list(self._items.values())

    def item(self, name: str) -> Item:
        """Return an item by its id. Raises: LookupError."""
        return self._items[name]

    def add(self, path: Path) -> Item:
        """Show a run that this viewer made, too."""
        real = path.resolve()
        item = item_of(real, "run", real.parent, real.name)
        return self._items.setdefault(item.id, item)

    def refresh(self) -> None:
        """Look for items that came since. Raises: EngineError."""
        for item in look(Path(self.config.path)).items:
            self._items.setdefault(item.id, item)

    def view(self, name: str) -> View:
        """Return what shows an item. Raises: LookupError."""
        item = self.item(name)
        with self._lock:
            if name not in self._views:
                self._views[name] = self._make(item)
            self._views.move_to_end(name)
            while len(self._views) > KEPT:
                self._views.popitem(last=False)
            return self._views[name]

    def _make(self, item: Item) -> View:
        if item.kind == "run":
            return RunView(item)
        if item.kind == "slide":
            c = self.config
            features, mil = (None if path is None else Path(path) for path in (c.features, c.mil))
            return SlideView(item, c.mpp, features, mil)
        return PictureView(item)

    def layers(self, name: str) -> list[Layer]:
        """Return an item's pictures. Raises: LookupError; GoneError; EngineError."""
        view = self.view(name)
        if isinstance(view, SlideView):
            pyramid = view.pyramid()
            return [Layer("picture", "slide", f"{file_stamp(view.item.path)[1]:x}", pyramid)]
        return view.layers()

    def tile(self, name: str, layer: str, place: tuple[int, int, int]) -> tuple[Tile, str]:
        """Return a tile (depth, column, row) and the version of its layer. Raises: as `layers`."""
        found = next((one for one in self.layers(name) if one.name == layer), None)
        if found is None:
            raise LookupError(layer)
        return self.makers.make(name, layer, found.pyramid, place), found.version

    def thumbnail(self, name: str) -> tuple[Tile, str]:
        """Return the first tile of the first layer, no smaller than THUMBNAIL_PX. Raises: as `layers`."""
        layers = self.layers(name)
        if not layers:
            raise LookupError(name)
        first = layers[0]
        depth, deepest = first.pyramid.depths
        while depth < deepest and -(-max(first.pyramid.size) // 2 ** (deepest - depth)) < THUMBNAIL_PX:
            depth += 1
        return self.makers.make(name, first.name, first.pyramid, (depth, 0, 0)), first.version

    def facts(self, name: str) -> dict[str, Any]:
        """Return all that the page needs of one item. Raises: as `layers`."""
        item, view, layers = self.item(name), self.view(name), self.layers(name)
        said: dict[str, Any] = {
            "id": item.id, "kind": item.kind, "name": item.name, "layers": [layer_facts(one) for one in layers],
            "damaged": self.makers.count(name), "overlays": [], "facts": {}, "report": False, "stretch": [1.0, 1.0],
        }  # fmt: skip
        first = layers[0].pyramid if layers else None
        said["height"], said["width"] = (0, 0) if first is None else first.size
        if isinstance(view, RunView):
            figures = view.figures()
            said |= {"synthetic": True, "mpp": view.mpp(layers), "figures": figures, "progress": view.progress()}
            said["height"], said["width"] = figures["height"], figures["width"]
            said["path"] = str(item.path)
        elif isinstance(view, SlideView):
            slide, known = view.opened()
            said |= {"synthetic": view.synthetic, "mpp": slide.resolution.mpp if known else None}
            said |= {"overlays": view.overlays(), "facts": view.facts(), "report": view.report() is not None}
            down, across = view.pyramid().stretch
            said["stretch"] = [across, down]
        else:
            image = first.image if isinstance(first, OurPyramid) else None
            said["mpp"] = None if image is None else image.mpp_um
            said["synthetic"] = image is not None and bool(image.provenance.get("synthetic"))
            said |= _deep_zoom_facts(item) if image is None else {}
        return said

    def figures(self) -> list[dict[str, Any]]:
        """Return a row per item for the contact sheet; what cannot be read says why."""
        rows = []
        for item in self.items:
            row: dict[str, Any] = {"id": item.id, "name": item.name, "kind": item.kind}
            view = self.view(item.id)
            try:
                if isinstance(view, RunView):
                    row |= view.figures() | {"synthetic": True, "version": view.signature()}
            except (EngineError, OSError) as error:
                row["problem"] = str(error)
            rows.append(row)
        return rows


def layer_facts(layer: Layer) -> dict[str, Any]:
    """Return what the page needs to show a layer."""
    height, width = layer.pyramid.size
    (first, deepest), (tile, overlap) = layer.pyramid.depths, layer.pyramid.tiling
    return {
        "name": layer.name, "title": layer.title, "version": layer.version, "height": height, "width": width,
        "first": first, "deepest": deepest, "tile": tile, "overlap": overlap,
        "live": None if layer.live is None else {"step": layer.live.step, "steps": layer.live.steps,
                                                 "pass": layer.live.pass_name, "level": layer.live.level},
    }  # fmt: skip


def _deep_zoom_facts(item: Item) -> dict[str, Any]:
    """Return µm/px and label of a Deep Zoom picture of ours; the format itself has no room for them."""
    try:
        record = json.loads(item.inside(tiles_folder(item.path) / PROVENANCE_FILE).read_bytes())
        mpp = float(record["mpp_um"])
        return {"mpp": mpp if mpp > 0 else None, "synthetic": bool(record.get("synthetic"))}
    except (OSError, ValueError, KeyError, TypeError):
        return {"mpp": None, "synthetic": False}
