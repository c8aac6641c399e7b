"""One row → one picture: its conditions, its run, its file. The model and the encoder are loaded once for all rows.

Invariant: the picture's bytes are those of generate_large of the same keys alone. Who computes is the caller's choice.
"""

import io
import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from engine.cohort.config import CohortConfig
from engine.cohort.sources import Embedder, open_reference, read_region
from engine.cohort.table import Row
from engine.core.errors import RowError
from engine.core.files import disk_error, replacing, write_atomically
from engine.core.progress import Progress
from engine.core.units import TILE_PX
from engine.generation.outputs import IMAGE, PREVIEW, REPORT
from engine.generation.run import Job, Loaded, prepare, run
from engine.generation.session import StartBackend
from engine.images.formats import ENDINGS, write_export
from engine.images.ome_zarr import Image
from engine.images.pyramid import resized
from engine.model.config import ModelConfig
from engine.sampling.config import RunConfig

PICTURES, RUNS, CONDITIONS, THUMBNAILS = "pictures", "runs", "conditions", "thumbnails"
THUMBNAIL_PX = 320
_KEPT = (REPORT, "config.yaml", PREVIEW)
"""What stays of a run folder with keep=pictures."""


@dataclass(frozen=True)
class Made:
    """What became of a row that was made."""

    name: str
    file: str
    """Its file, from the cohort's folder."""
    note: str = ""
    """What to know of it, in one word; empty if there is nothing."""
    message: str = ""
    patches: int = 0
    """Patches drawn, of a bag."""
    seconds: float = 0.0


def picture_path(config: CohortConfig, name: str) -> Path:
    """Return the file of a picture."""
    return Path(config.out) / PICTURES / (name + ENDINGS[config.picture][0])


class PictureMaker:
    """Makes pictures; may be asked by several threads at once, each for a row of its own."""

    def __init__(self, config: CohortConfig, model: ModelConfig, loaded: Loaded) -> None:
        """`config` has its dtype settled; `loaded` is its model."""
        self.config, self.model, self.loaded = config, model, loaded
        self._embedder = Embedder(config, loaded.model)
        self._encoding = threading.Lock()
        self._folder = Path(config.out)

    def make(self, row: Row, start: StartBackend, progress: Progress) -> Made:
        """Make, continue or complete a picture; return it.

        Raises: RowError, SlideError and others for what is wrong with this row; EngineError that ends the job.
        """
        job = self._job(row)
        run(job, start, progress, loaded=self.loaded)
        path = picture_path(self.config, row.name)
        image, how = Image.open(job.folder / IMAGE), self.config.output
        write_export(path, image, self.config.picture, how.tiff_compression, how.jpeg_quality)
        write_thumbnail(self._folder, row.name, whole(image), row.origin)
        if self.config.keep == "pictures":
            self._drop(job.folder)
        return Made(row.name, f"{PICTURES}/{path.name}")

    def _job(self, row: Row) -> Job:
        """Return the run of a row. Raises: RowError `bad_config` for what this model cannot draw."""
        try:
            return replace(prepare(self.run_config(row), self.model), origin=row.origin)
        except ValueError as error:
            raise RowError("bad_config", f"{row.name}: {error}") from error

    def run_config(self, row: Row) -> RunConfig:
        """Return the configuration that draws this row alone. Raises: RowError, SlideError."""
        assert row.height is not None
        assert row.width is not None  # they were looked up
        config, folder = self.config, self._folder / RUNS / row.name
        store = config.canvas.store and f"{config.canvas.store.rstrip('/')}/{row.name}"
        plain = {f.name: getattr(config, f.name) for f in fields(RunConfig)}
        plain |= {
            "canvas": replace(config.canvas, height=row.height, width=row.width, store=store),
            "sampling": replace(config.sampling, seed=row.seed),
            "output": replace(config.output, folder=str(folder)),
            **self._source(row),
        }
        try:
            return RunConfig(**plain)
        except ValueError as error:
            raise RowError("bad_config", f"{row.name}: {error}") from error

    def _source(self, row: Row) -> dict[str, str]:
        """Return the keys that say what a run is conditioned on; makes a reference's vectors if they are not there."""
        if row.reference is not None:
            return {"embeddings": str(self._vectors(row))}
        if row.embeddings is not None:
            return {"embeddings": row.embeddings}
        return {"text": row.text} if row.text is not None else {"condition": "cdm"}

    def _vectors(self, row: Row) -> Path:
        """Return the file of SSL vectors of a row's region; what is there of an earlier start is kept."""
        assert row.reference is not None
        path = self._folder / CONDITIONS / f"{row.name}.{row.digest[:16]}.npy"
        if path.exists():
            return path
        assert row.height is not None
        assert row.width is not None
        cells = -(-row.height // TILE_PX), -(-row.width // TILE_PX)
        base = self.model.base_mpp
        slide = open_reference(row.reference, self.config, base)
        try:
            picture = read_region(slide, row.region, base)
        finally:
            slide.close()
        with self._encoding:  # one network, several threads
            grid = self._embedder.grid(picture, cells, row.reference)
        write_thumbnail(self._folder, f"{row.name}_reference", _reduced(picture[: row.height, : row.width]))
        with replacing(path, grid.nbytes) as partial, partial.open("wb") as file:
            np.save(file, grid)
        return path

    def _drop(self, folder: Path) -> None:
        """Remove what a finished run needs no more."""
        try:
            # state.json first: without it nobody takes the rest for a run.
            for entry in sorted(folder.iterdir(), key=lambda p: p.name != "state.json"):
                if entry.name not in _KEPT:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError as error:
            raise disk_error(error, f"{folder} cannot be cleared", folder) from error


def whole(image: Image) -> Pillow.Image:
    """Return a picture, reduced."""
    height, width = image.sizes[0]
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    return resized(image, max(1, round(height * scale)), max(1, round(width * scale)))


def _reduced(picture: np.ndarray) -> Pillow.Image:
    found = Pillow.fromarray(picture)
    found = found.reduce(max(1, max(found.size) // (2 * THUMBNAIL_PX)))
    found.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return found


def write_thumbnail(folder: Path, name: str, picture: Pillow.Image, origin: Mapping[str, str] | None = None) -> None:
    """Write a small JPEG for the report; `origin` is said in a drawn one, which is synthetic. Raises CanvasError."""
    data, said = io.BytesIO(), {} if origin is None else {"comment": json.dumps({"synthetic": True, **origin})}
    picture.save(data, "JPEG", quality=85, **said)
    write_atomically(folder / THUMBNAILS / f"{name}.jpg", data.getvalue())
