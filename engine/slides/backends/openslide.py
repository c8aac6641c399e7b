"""The scanners' own formats by OpenSlide: NDPI, MIRAX, Leica, Philips, Ventana, DICOM, JPEG 2000 SVS and so on.

OpenSlide's decoders forgive: what raises is damaged, but a break they paint over stays unseen. After an error a
handle is useless for good, so a new one takes its place; px are looked up again block by block with handles of their
own. Reads are safe from several threads. It does not know µm/px targets. Source: OpenSlide 4.0.1.
"""

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from engine.core.errors import SlideError
from engine.slides.backends.base import Window
from engine.slides.backends.choice import ONLY, only_one
from engine.slides.resolution import Claim, Claims
from engine.slides.units import number

BLOCK_PX = 256
"""Around a damaged place, px are read in blocks of this size."""


def vendor_of(path: Path) -> str | None:
    """Return OpenSlide's name of the format, or None if it knows none."""
    return openslide.OpenSlide.detect_format(path)


def open_vendor(path: Path, name: str, series: int | None = None) -> "VendorLevels":
    """Open a slide; `series` may be 0. Raises SlideError `not_a_slide` or `no_such_series`."""
    only_one(name, series)
    return VendorLevels(path, name)


class VendorLevels:
    """Levels of an OpenSlide handle."""

    reader, choice = "openslide", ONLY

    def __init__(self, path: Path, name: str) -> None:
        """Use `open_vendor`."""
        self._path, self._name = path, name
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._slide = openslide.OpenSlide(path)
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(
                "not_a_slide",
                f"{name}: {path} must be a whole slide; OpenSlide cannot open it ({error}). Copy it again.",
            ) from error
        _check_dicom(name, self._slide.properties)
        self.sizes = tuple((h, w) for w, h in self._slide.level_dimensions)
        self._downsamples = self._slide.level_downsamples
        self.claims = _claims(self._slide.properties)

    def window(self, level: int, y: int, x: int, h: int, w: int) -> Window:
        """Return a window that lies inside the level.

        OpenSlide takes whole level-0 px: the corner may be off by half a level-0 px.
        """
        window = Window.absent(h, w)
        whole = self._try(self._slide, level, y, x, h, w)
        if whole is not None:
            window.paint(0, 0, whole, (h, w))
            return window
        with self._lock:  # a handle of its own: another thread's error must not make these blocks look damaged
            fresh = self._reopened()
            for top in range(0, h, BLOCK_PX):
                for left in range(0, w, BLOCK_PX):
                    size = min(BLOCK_PX, h - top), min(BLOCK_PX, w - left)
                    block = self._try(fresh, level, y + top, x + left, *size)
                    window.paint(top, left, block, size)
                    fresh = fresh if block is not None else self._reopened()
            self._slide = fresh
        return window

    def close(self) -> None:
        """Give the file back."""
        if not self._closed:
            self._slide.close()
            self._closed = True

    def _reopened(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(
                "vanished", f"{self._name}: {self._path} can no longer be read ({error}). Is its disk there?"
            ) from error

    def _try(self, slide: openslide.OpenSlide, level: int, y: int, x: int, h: int, w: int) -> NDArray[np.uint8] | None:
        factor = self._downsamples[level]
        try:
            return np.asarray(slide.read_region((round(x * factor), round(y * factor)), level, (w, h)))
        except openslide.OpenSlideError:
            return None


def _check_dicom(name: str, properties: Mapping[str, str]) -> None:
    """Refuse JPEG 2000 in DICOM whose stream transforms RGB itself: OpenSlide converts it twice (its issue 646).

    Raises: SlideError `unsupported`.
    """
    kind = properties.get("dicom.PhotometricInterpretation", "")
    if kind in ("YBR_ICT", "YBR_RCT"):
        raise SlideError(
            "unsupported",
            f"{name}: OpenSlide must know the colours of a DICOM slide; of {kind} it gives wrong ones. Write the slide "
            "anew as JPEG, or as TIFF (for instance with bfconvert).",
        )


def _claims(properties: Mapping[str, str]) -> Claims:
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "?")
    x, y = (number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    # For generic TIFF OpenSlide copies the resolution tags, which the range check then judges all the same.
    claims = (Claim(f"openslide.mpp ({vendor})", x, y),) if x and y else ()
    return Claims(claims, number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)))
