"""What rows are drawn after: slides opened, regions checked and read, SSL vectors of them.

Invariant: what is read is the field that was asked for, at the model's base µm/px, every px of it from the file. It
does not know runs or bags.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.cohort.config import CohortConfig
from engine.cohort.table import Asked, BadRow, Row
from engine.conditions.reference import MAX_PX, cover_canvas, embedding_grid
from engine.core.errors import EngineError, RowError, SlideError
from engine.core.runtime import encoder_device, torch_dtype
from engine.core.streaming import Box
from engine.core.units import TILE_PX
from engine.model.encoders.base import SSLEncoder
from engine.model.encoders.registry import load_encoder
from engine.model.zoomldm import ZoomLDM
from engine.slides.boundary import one_slide
from engine.slides.slide import PICTURE_SUFFIXES, Slide, open_slide, slide_name


def open_reference(path: str, config: CohortConfig, base_mpp: float) -> Slide:
    """Open the slide or picture of a row; a PNG or JPEG is at the base µm/px unless `mpp` says otherwise.

    Raises: SlideError.
    """
    file = Path(path)
    plain = file.suffix.lower() in PICTURE_SUFFIXES
    mpp = config.mpp or base_mpp
    known = {file.name: (mpp, mpp)} if plain else None
    with one_slide(slide_name(file), file, "opened"):
        return open_slide(file, known, config.mpp)


def looked_up(asked: Sequence[Asked], config: CohortConfig, base_mpp: float) -> Iterator[Asked]:
    """Yield the rows with their size and source slide, after a look at each reference; what does not fit is a failure.

    A slide is opened once for all rows that follow each other.
    """
    slide: Slide | None = None
    for row in asked:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            if row.reference is not None and (slide is None or str(slide.path) != row.reference):
                if slide is not None:
                    slide.close()
                slide = None
                slide = open_reference(row.reference, config, base_mpp)
            yield _fitted(row, config, base_mpp, slide if row.reference is not None else None)
        except (SlideError, RowError) as error:
            yield BadRow(row.name, error.code, str(error), row)
    if slide is not None:
        slide.close()


def _fitted(row: Row, config: CohortConfig, base_mpp: float, slide: Slide | None) -> Row:
    """Return a row with height and width.

    Raises: RowError `region_outside`, `region_too_small`, `no_conditions` or `no_pixels`.
    """
    if slide is None:
        if config.bags_only and row.embeddings is None:
            raise RowError("no_conditions", f"{row.name}: a bag's tiles are drawn on those of a reference or "
                           "embeddings; the row has none. Name one, or draw pictures.")  # fmt: skip
        if config.bags_only and config.bags.strength < 1:
            raise RowError("no_pixels", f"{row.name}: with bags.strength below 1 patches begin from the tiles of a "
                           "reference; stored vectors have none. Name one, or set bags.strength 1.")  # fmt: skip
        return _sized(row, (config.canvas.height, config.canvas.width))
    box = row.region
    if box is not None and (box.y1 > slide.height or box.x1 > slide.width):
        raise RowError(
            "region_outside",
            f"{row.name}: a region must lie in its slide, {slide.width}x{slide.height} px; got "
            f"{','.join(map(str, box.xywh))} (x,y,width,height). Correct it.",
        )
    row = replace(row, source_slide=row.source_slide or slide.name)
    if config.bags_only:
        return _sized(row, (config.canvas.height, config.canvas.width))
    size = size_px(slide, box, base_mpp)
    if min(size) < TILE_PX or size[0] * size[1] > MAX_PX:
        code = "region_too_small" if min(size) < TILE_PX else "region_too_large"
        raise RowError(
            code,
            f"{row.name}: what a picture is drawn after must have at least {TILE_PX} px on each side and at most "
            f"{MAX_PX} px at {base_mpp:g} µm/px; it has {size[1]}x{size[0]}. Name another region of {slide.name}.",
        )
    return _sized(row, size if box is not None else (config.canvas.height, config.canvas.width))


def _sized(row: Row, size: tuple[int, int]) -> Row:
    return replace(row, height=row.height or size[0], width=row.width or size[1])


def size_px(slide: Slide, box: Box | None, base_mpp: float) -> tuple[int, int]:
    """Return the px (h, w) of a region, or of the whole slide, at the base µm/px, as many as lie in it whole."""
    height, width = box.size if box is not None else (slide.height, slide.width)
    across, down = slide.field(1, base_mpp)
    return round(height / down - 0.49), round(width / across - 0.49)


def read_region(slide: Slide, box: Box | None, base_mpp: float) -> NDArray[np.uint8]:
    """Return a region, or the whole slide, at the base µm/px: uint8 (h, w, 3).

    Raises: SlideError `damaged` where px are lost.
    """
    height, width = size_px(slide, box, base_mpp)
    x, y = (box.x0, box.y0) if box is not None else (0, 0)
    found = slide.read(x, y, width, height, base_mpp)
    if not found.valid.all():
        raise SlideError("damaged", f"{slide.name}: a region to draw after must hold all of its px; "
                         f"{1 - found.valid.mean():.1%} of them are damaged or absent. Name another one.")  # fmt: skip
    return np.ascontiguousarray(found.pixels)


class Embedder:
    """The model's SSL encoder, loaded once, when it is first needed."""

    def __init__(self, config: CohortConfig, model: ZoomLDM) -> None:
        self._config, self._model = config, model
        self._encoder: SSLEncoder | None = None

    @property
    def encoder(self) -> SSLEncoder:
        """The encoder. Raises: CheckpointError when it cannot be had."""
        if self._encoder is None:
            section = self._config.model
            device, dtype = encoder_device(section), torch_dtype(section.dtype)
            try:
                self._encoder = load_encoder(
                    self._model.config.encoder, section.encoder_source, self._model.extras, device, dtype
                )
            except ValueError as error:
                raise EngineError(str(error)) from error
        return self._encoder

    def grid(self, picture: NDArray[np.uint8], cells: tuple[int, int], name: str) -> NDArray[np.float32]:
        """Return the SSL vectors of a picture, uint8 (h, w, 3), over a canvas of `cells`: float32 (D, *cells).

        A picture that is too large gives its upper left part, one that is too small is mirrored, as a run does with
        its reference.
        """
        return cover_canvas(embedding_grid(picture, self.encoder), *cells, self._model.config.ssl_dim, name)
