"""Which samples of a picture are colours, and which of its px hold any: alpha, nodata values, mask pages.

Invariant: a px is valid only if everything the file says of it agrees: its alpha is not 0, its colours are not the
nodata value, and a mask page or mask file keeps it. What is not valid becomes ABSENT white, as px that were never
written. A sample beyond the third is alpha only where the file calls it so and its values are those of a mask;
otherwise it is a band, such as near infrared, and left out. `reader` says what was found.
Source: TIFF 6.0 (ExtraSamples, TransparencyMask), GDAL's GeoTIFF driver (tag 42113, NODATA_VALUES, .msk files).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from engine.core.errors import SlideError
from engine.slides.backends.base import ABSENT, GREY, Levels, Window
from engine.slides.samples.masks import Mask, masks_of

_NODATA, _GDAL_METADATA = 42113, 42112
_BETWEEN, _VALUES = 0.1, 16
"""A sample is a band when more than this share of it is neither 0 nor 255, in more than so many values: a mask has soft
rims at most."""
_FAINT = 128
"""Colours that are stored multiplied by a lower alpha than this are off by more than one step when they are divided."""


@dataclass(frozen=True)
class Samples:
    """Which samples of a px are read; the first three are its colours."""

    alpha: int | None = None
    """Number of the sample that is its alpha."""
    premultiplied: bool = False
    """Whether the colours are stored multiplied by alpha."""
    left_out: int = 0
    """Samples that are neither."""

    @property
    def last(self) -> int:
        """Number of samples that must be read to have them all."""
        return 3 if self.alpha is None else self.alpha + 1

    @property
    def said(self) -> str:
        """What `reader` tells of them."""
        return f", {self.left_out} more band(s) left out" if self.left_out else ""

    def without_alpha(self) -> "Samples":
        """Return the same for an alpha that turned out to be a band."""
        return Samples(left_out=self.left_out + 1)

    def of(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the colours of px (h, w, n), (h, w, 3), or with alpha (h, w, 4)."""
        if self.alpha is None:
            return pixels[..., :3]
        found = np.ascontiguousarray(pixels[..., [0, 1, 2, self.alpha]])
        if self.premultiplied:
            alpha = found[..., 3:]
            found[..., 3:][alpha < _FAINT] = 0
            whole = found[..., :3].astype(np.float32) * 255 / np.maximum(alpha, 1)
            found[..., :3] = np.rint(np.minimum(whole, 255))
        return found


def samples_of(page: Any, count: int) -> Samples:
    """Return how the `count` samples of an RGB page are read; of two alphas the first counts."""
    extra = [tifffile.EXTRASAMPLE(e) for e in page.extrasamples]
    first = count - len(extra)
    kinds = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
    alpha = next((first + i for i, kind in enumerate(extra) if kind in kinds and first + i >= 3), None)
    if alpha is None:
        return Samples(left_out=count - 3)
    return Samples(alpha, extra[alpha - first] == kinds[0], count - 4)


def is_a_band(values: NDArray[np.uint8]) -> bool:
    """Whether values of a sample that is called alpha are those of a band: many, and between 0 and 255."""
    between = values[(values > 0) & (values < 255)]
    return between.size > _BETWEEN * values.size and len(np.unique(between)) > _VALUES


def probes(height: int, width: int, side: int = 256) -> Iterator[tuple[int, int, int, int]]:
    """Yield 3 × 3 windows (y, x, h, w) spread over a level, to look at a sample before it is believed."""
    h, w = min(side, height), min(side, width)
    for y in sorted({round((height - h) * i / 2) for i in range(3)}):
        for x in sorted({round((width - w) * i / 2) for i in range(3)}):
            yield y, x, h, w


def with_validity(path: Path, name: str, levels: Levels, tiff: tifffile.TiffFile, page: Any) -> Levels:
    """Return levels whose windows heed nodata and masks; the same ones if the file has none. `page` is level 0.

    Raises: SlideError `unsupported` for a mask or a nodata value that is none, naming it.
    """
    with ExitStack() as stack:
        stack.callback(levels.close)
        nodata, masks = nodata_of(name, page), masks_of(path, name, levels.sizes[0], tiff)
        stack.pop_all()  # they stay open, unless something was raised
    return levels if nodata is None and not masks else ValidLevels(path, name, levels, nodata, masks)


def nodata_of(name: str, page: Any) -> tuple[int, int, int] | None:
    """Return the colour that stands for no data, or None. A value no 8-bit px can have (−9999, nan) is none.

    Raises: SlideError `unsupported` for text that is no number.
    """
    tags = [page.tags.get(code) for code in (_NODATA, _GDAL_METADATA)]
    texts = [str(tag.value).strip("\0 ") if tag is not None else "" for tag in tags]
    words = _nodata_values(texts[1]) or ([texts[0]] * 3 if texts[0] else [])
    try:
        values = [float(word) for word in words[:3]]
    except ValueError as error:
        raise SlideError(
            "unsupported",
            f"{name}: GDAL's nodata (tag {_NODATA}, or NODATA_VALUES) must be numbers; it is {' '.join(words)!r}. "
            "Set it anew (gdal_edit -a_nodata 0, or -unsetnodata).",
        ) from error
    if len(values) < 3 or not all(math.isfinite(v) and v == int(v) and 0 <= v <= 255 for v in values):
        return None
    return int(values[0]), int(values[1]), int(values[2])


def _nodata_values(text: str) -> list[str]:
    try:
        items = ElementTree.fromstring(text).iter("Item") if text else []
    except ElementTree.ParseError:
        return []
    return next(((item.text or "").split() for item in items if item.get("name") == "NODATA_VALUES"), [])


class ValidLevels:
    """Levels whose px are judged by a nodata value and by masks; safe to read from several threads."""

    def __init__(
        self, path: Path, name: str, levels: Levels, nodata: tuple[int, int, int] | None, masks: Sequence[Mask]
    ) -> None:
        """Use `with_validity`."""
        self.sizes, self.claims, self.choice = levels.sizes, levels.claims, levels.choice
        said = [f"nodata {' '.join(map(str, nodata))}"] if nodata else []
        said += ["mask"] if masks else []
        self.reader = ", ".join([levels.reader, *said])
        self._levels, self._nodata, self._masks = levels, nodata, masks

    def window(self, level: int, y: int, x: int, h: int, w: int) -> Window:
        """Return a window that lies inside the level."""
        window = self._levels.window(level, y, x, h, w)
        if self._nodata is not None:
            self._drop(window, (window.pixels == self._nodata).all(axis=2))
        if self._masks:
            size = self.sizes[level]
            mask = next((m for m in self._masks if m.size == size), self._masks[0])
            kept, broken = mask.window(size, y, x, h, w)
            self._drop(window, ~kept)
            window.pixels[broken], window.valid[broken] = GREY, False
            window.damaged += bool(broken.any())
        return window

    @staticmethod
    def _drop(window: Window, where: NDArray[np.bool_]) -> None:
        where = where & window.valid  # what is damaged stays grey
        window.pixels[where], window.valid[where] = ABSENT, False

    def close(self) -> None:
        """Give the files back."""
        self._levels.close()
        for mask in self._masks:
            mask.close()
