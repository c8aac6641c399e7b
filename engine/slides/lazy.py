"""A slide as dask arrays: its levels as they are stored, or the whole at one µm/px. Reads, never writes.

Invariant: a block holds what `Slide.window` or `Slide.read` give for it, bit by bit. It does not know how a slide is
opened: that comes in as a function which travels.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import SlideError
from engine.core.lazy import Source, lazy_array

if TYPE_CHECKING:
    import dask.array as da

Damaged = Literal["error", "grey"]
"""What to do with px of the file that cannot be decoded: stop, or give them as grey (128)."""


class _Region(Protocol):
    @property
    def pixels(self) -> NDArray[np.uint8]: ...
    @property
    def damaged(self) -> int: ...


class Readable(Protocol):
    """An open slide."""

    name: str

    def field(self, px: float, mpp: float) -> tuple[float, float]: ...
    def read(self, x: float, y: float, w: int, h: int, mpp: float) -> _Region: ...
    def window(self, level: int, y: int, x: int, h: int, w: int) -> _Region: ...


@dataclass(frozen=True, eq=False)
class LazySlide:
    """What makes dask arrays of a slide."""

    open: Callable[[], Any]
    """Returns the slide, open in the process that calls; picklable."""
    token: tuple[Hashable, ...]
    """Everything that decides its px."""
    damaged: Damaged = "error"

    def level(self, level: int, size: tuple[int, int], chunks: int) -> "da.Array":
        """Return a level as it is stored: uint8 (3, h, w)."""
        return self._array(_Level(self, level), level, size, chunks)

    def at(self, mpp: float, size: tuple[int, int], chunks: int) -> "da.Array":
        """Return the whole slide at `mpp` µm/px: uint8 (3, h, w), block by block what `Slide.read` gives."""
        return self._array(_Scaled(self, mpp), f"{mpp!r} µm/px", size, chunks)

    def _array(self, source: Source, what: Hashable, size: tuple[int, int], chunks: int) -> "da.Array":
        return lazy_array(source, (3, *size), np.uint8, ("slide", *self.token, what, self.damaged), chunks)

    def pixels(self, region: _Region, slide: Readable) -> NDArray[np.uint8]:
        """Return a region as (3, h, w). Raises: SlideError `damaged` if that shall stop."""
        if region.damaged and self.damaged == "error":
            raise SlideError(
                "damaged",
                f"{slide.name}: px must be whole to be computed with; {region.damaged} block(s) cannot be decoded. "
                'Copy the file again, or pass damaged="grey" to have them as grey.',
            )
        return region.pixels.transpose(2, 0, 1)


@dataclass(frozen=True, eq=False)
class _Level:
    slide: LazySlide
    level: int

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.uint8]:
        slide: Readable = self.slide.open()
        return self.slide.pixels(slide.window(self.level, y0, x0, y1 - y0, x1 - x0), slide)


@dataclass(frozen=True, eq=False)
class _Scaled:
    slide: LazySlide
    mpp: float

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.uint8]:
        slide: Readable = self.slide.open()
        step_x, step_y = slide.field(1, self.mpp)
        return self.slide.pixels(slide.read(x0 * step_x, y0 * step_y, x1 - x0, y1 - y0, self.mpp), slide)
