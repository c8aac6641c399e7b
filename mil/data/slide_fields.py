"""Fields of slides by the slides' names: the one module of mil that opens slides, and only to show them.

It knows level-0 px alone: a field is what features files say, whatever µm/px the slide states or lacks.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.slides.boundary import one_slide
from engine.slides.slide import OpenSlides, find_slides, slide_name
from mil.data.names import match_names, near_names
from mil.errors import RunError


class SlideFields:
    """A folder of slides as `mil.report.attended.ReadField`."""

    def __init__(self, folder: Path) -> None:
        """Raises EngineError for no such folder, or one without slides."""
        self._folder = folder
        self._paths: dict[str, list[Path]] = {}
        for path in find_slides(folder):
            self._paths.setdefault(slide_name(path), []).append(path)
        # Said to have 1 µm/px, every slide can be asked for fields in level-0 px.
        self._mpp = dict.fromkeys(self._paths, (1.0, 1.0))
        self._slides: dict[int | None, OpenSlides] = {}

    def __call__(
        self, slide: str, corner: tuple[float, float], size: tuple[float, float], px: int, series: int | None = None
    ) -> NDArray[np.uint8]:
        """See `ReadField`. Raises RunError, SlideError."""
        paths = self._paths.get(match_names([slide], self._paths).get(slide, slide), [])
        if len(paths) != 1:
            found = "two or more" if paths else "none"
            near = "" if paths else near_names([slide], self._paths)
            raise RunError(
                f"{self._folder} must hold one slide named {slide}; it holds {found}.{near} Correct --slides."
            )
        (x, y), (width, height) = corner, size
        if series not in self._slides:
            self._slides[series] = OpenSlides(self._mpp, series=series)
        with one_slide(slide, paths[0], "read"):
            return (
                self._slides[series].get(paths[0]).read(x, y, px, max(1, round(px * height / width)), width / px).pixels
            )
