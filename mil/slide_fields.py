"""Fields of slides by the slides' names: the one module of mil that opens slides, and only to show them.

It knows level-0 px alone: a field is what features files say, whatever µm/px the slide states or lacks.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.slides.slide import OpenSlides, find_slides, slide_name
from mil.errors import RunError


class SlideFields:
    """A folder of slides as `mil.attended.ReadField`."""

    def __init__(self, folder: Path) -> None:
        """Raises EngineError for no such folder, or one without slides."""
        self._folder = folder
        self._paths: dict[str, list[Path]] = {}
        for path in find_slides(folder):
            self._paths.setdefault(slide_name(path), []).append(path)
        # Said to have 1 µm/px, every slide can be asked for fields in level-0 px.
        self._slides = OpenSlides(dict.fromkeys(self._paths, (1.0, 1.0)))

    def __call__(
        self, slide: str, corner: tuple[float, float], size: tuple[float, float], px: int
    ) -> NDArray[np.uint8]:
        """See `ReadField`. Raises RunError, SlideError."""
        paths = self._paths.get(slide, [])
        if len(paths) != 1:
            found = "two or more" if paths else "none"
            raise RunError(f"{self._folder} must hold one slide named {slide}; it holds {found}. Correct --slides.")
        (x, y), (width, height) = corner, size
        return self._slides.get(paths[0]).read(x, y, px, max(1, round(px * height / width)), width / px).pixels
