"""Pictures from Python: a configuration in, a `Run` out, and what can be asked of it.

Nothing here reads a command line or ends the process; mistakes raise EngineError.
"""

import base64
import hashlib
import html
import io
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import torch

from engine._backends.sampling import ask_hardware, sampling_backend
from engine._command import plan_of
from engine.api.arrays import committed_latents, decoded_on_demand, predicted_x0
from engine.canvas.run_state import load_state
from engine.canvas.storage import GIVEN
from engine.core.cli import configured
from engine.core.config import RayConfig
from engine.core.errors import ConfigError, EngineError
from engine.core.lazy import CHUNK_PX, as_rgb
from engine.core.progress import Progress, RunCallback
from engine.generation.export import ExportConfig, export
from engine.generation.finished_run import FinishedRun
from engine.generation.inpaint import InpaintConfig, InpaintJob, prepare_inpaint, redo, region_folder
from engine.generation.outputs import GUIDE, REPORT
from engine.generation.preview import find_picture
from engine.generation.run import prepare, run, stored_config
from engine.generation.superres import SuperresConfig, plan_run
from engine.images.ome_zarr import Image
from engine.images.pyramid import reduced
from engine.sampling.config import RunConfig

if TYPE_CHECKING:
    import dask.array as da

    from engine.api.viewing import Viewing

BackendName = Literal["local", "ray", "auto"]
"""local: this process. ray: the cluster of `ray.address`, or a private Ray. auto: Ray where the configuration names a
cluster or asks for several replicas, or several GPUs are here; else this process."""
Reporting = bool | RunCallback
"""True shows progress (a bar in notebooks and terminals), False is silent; or an object with step, tiles, judged."""


def load_config(file: str | Path | None = None, **changes: Any) -> RunConfig:
    """Return the configuration of a picture: a YAML file's keys, and `changes` over them.

    Sections are given as mappings: load_config("configs/demo.yaml", canvas={"height": 2048}, reference="a.png").
    Raises: ConfigError naming the key.

    >>> import engine
    >>> config = engine.load_config("configs/demo.yaml", canvas={"height": 512, "width": 768})
    >>> config.canvas.height, config.canvas.width, config.sampling.solver
    (512, 768, 'dpmpp_2m')
    """
    return configured(RunConfig, file, changes)


def generate(
    config: RunConfig,
    *,
    reference: "np.ndarray | da.Array | None" = None,
    backend: BackendName = "auto",
    progress: Reporting = True,
) -> "Run":
    """Make, continue or complete the picture of a configuration; return its run.

    `reference` is a picture at the model's base µm/px that conditions the run, uint8 (h, w, 3) or (3, h, w); it is kept
    in the run's folder. Raises: EngineError; whatever is committed survives, and the same call continues it.

    >>> import engine
    >>> quick = {"canvas": {"height": 256, "width": 256}, "sampling": {"stride": 500, "batch_size": 1}}
    >>> config = engine.load_config("configs/demo.yaml", **quick, output={"folder": "runs/quick", "formats": []})
    >>> run = engine.generate(config, backend="local", progress=False)
    >>> run.image.height, run.image.width, run.report["tiles"] > 0
    (256, 256, True)
    """
    if reference is not None:
        config = replace(config, reference=str(_given(reference, config.output.folder)))
    return _make(config, prepare, backend, progress)


def enlarge(
    image: "str | Path | np.ndarray | da.Array",
    *,
    scale: int | None = None,
    mpp: float | None = None,
    magnification: str | None = None,
    config: str | Path | None = None,
    backend: BackendName = "auto",
    progress: Reporting = True,
    **changes: Any,
) -> "Run":
    """Enlarge a picture to the model's base magnification; reduced again, the result is the picture.

    `image` is a file, or uint8 (h, w, 3) or (3, h, w). One of `scale` (2, 4, 8, 16), `mpp` (µm/px) and `magnification`
    says what it is. Raises: EngineError.

    >>> import engine, numpy as np
    >>> picture = np.full((64, 64, 3), 200, np.uint8)
    >>> quick = {"inversion": {"steps": 2}, "sampling": {"stride": 100, "batch_size": 1}}
    >>> place = {"folder": "runs/enlarged", "formats": []}
    >>> run = engine.enlarge(picture, scale=4, **quick, output=place, backend="local", progress=False)
    >>> run.thumbnail(256).shape
    (256, 256, 3)
    """
    given = {"scale": scale, "mpp": mpp, "magnification": magnification, **changes}
    asked = {name: value for name, value in given.items() if value is not None}
    if isinstance(image, str | Path):
        asked["image"] = str(image)
    else:
        place = configured(SuperresConfig, config, {**asked, "image": "array"}).output.folder
        asked["image"] = str(_given(image, place))
    return _make(configured(SuperresConfig, config, asked), plan_run, backend, progress)


def _given(picture: Any, folder: str) -> Path:
    """Return the file that keeps an array in a run's folder; its name tells contents apart, so none replaces another.

    Raises: EngineError.
    """
    pixels = np.ascontiguousarray(np.asarray(as_rgb(picture)))
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return picture_file(pixels, Path(folder) / f"{GIVEN}{digest[:12]}.png")


def picture_file(picture: Any, path: Path) -> Path:
    """Return a picture's file; an array, uint8 (h, w, 3) or (3, h, w), numpy or dask, is written to `path` (PNG).

    Raises: EngineError for another array.
    """
    if isinstance(picture, str | Path):
        return Path(picture)
    pixels = np.ascontiguousarray(np.asarray(as_rgb(picture)))
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)
    return path


def _make(config: Any, plan: Any, backend: BackendName, progress: Reporting) -> "Run":
    config = replace(config, ray=chosen_backend(config.ray, backend))
    try:
        job = plan(config)
    except ValueError as error:  # the configuration asks for what this model or picture has not
        raise ConfigError(str(error)) from error
    with ExitStack() as connection:
        shown = shown_progress(progress)
        return Run(run(job, sampling_backend(job.config, connection), shown, ask_hardware(job.config)))


def chosen_backend(ray: RayConfig, backend: BackendName) -> RayConfig:
    """Return the Ray section that a backend means. Raises: ConfigError for another name."""
    if backend not in ("local", "ray", "auto"):
        raise ConfigError(f"backend must be local, ray or auto; got {backend!r}.")
    if backend == "auto":
        several = (ray.replicas or 1) > 1 or torch.cuda.device_count() > 1
        return replace(ray, enabled=ray.enabled and (ray.address is not None or several))
    return replace(ray, enabled=backend == "ray")


def shown_progress(progress: Reporting) -> Progress:
    """Return what a run tells its progress."""
    if isinstance(progress, bool):
        return Progress(sys.stderr if progress else io.StringIO())
    return Progress(io.StringIO(), also=progress)


class Run:
    """A run folder: a picture that is finished or still at work, its guide, its figures and its latents.

    >>> import engine
    >>> quick = {"canvas": {"height": 256, "width": 256}, "sampling": {"stride": 500, "batch_size": 1}}
    >>> config = engine.load_config("configs/demo.yaml", **quick, output={"folder": "runs/quick", "formats": []})
    >>> _ = engine.generate(config, backend="local", progress=False)
    >>> run = engine.Run.open("runs/quick")
    >>> run
    Run('runs/quick')
    >>> run.thumbnail(64).shape, run.latents().shape
    ((64, 64, 3), (3, 64, 64))
    >>> str(run.export("png", max_px=64))
    'runs/quick/exports/image_max64.png'
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises: EngineError unless a run lies there."""
        self.folder = Path(folder)
        if not (self.folder / "state.json").is_file():
            raise EngineError(
                f"{self.folder} must be the folder of a run, with state.json; it is not. Pass output.folder."
            )

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Return the run in a folder. Raises: EngineError unless one lies there."""
        return cls(folder)

    @property
    def config(self) -> RunConfig:
        """The configuration it was made with; of a region, that of the whole picture. Raises: EngineError."""
        inpainted = "redo.parent" in load_state(self.folder / "state.json").keys
        return stored_config(self._finished.root.folder if inpainted else self.folder)

    @property
    def image(self) -> Image:
        """The decoded picture, an OME-Zarr pyramid that is read by rows. Raises: EngineError while it is at work."""
        found = find_picture(self.folder)
        if found is None:
            raise EngineError(f"{self.folder} has no finished picture yet. Continue it, or use export() for its x0.")
        return found

    @property
    def guide(self) -> np.ndarray | None:
        """The picture that steered it, uint8 (h, w, 3), or None."""
        path = self.folder / GUIDE
        return np.asarray(PIL.Image.open(path).convert("RGB")) if path.is_file() else None

    @property
    def report(self) -> dict[str, Any]:
        """What report.json holds: seams, agreement, detail, times; empty until the run is finished."""
        path = self.folder / REPORT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def thumbnail(self, longest: int = 1024) -> np.ndarray:
        """Return the picture reduced to a longest edge in px: uint8 (h, w, 3)."""
        picture = reduced(self.image, min(longest, max(self.image.height, self.image.width)))
        return np.ascontiguousarray(picture.read(0, picture.sizes[0][0]).transpose(1, 2, 0))

    def latents(self, level: str | None = None, chunks: int = CHUNK_PX) -> "da.Array":
        """Return a level's committed latents (None: the finest's) as a dask array: float32 (3, h, w), in latent px.

        Raises: ConfigError for a level that is not sampled; EngineError while it has none; CanvasError when computed
        after a further commit.
        """
        return committed_latents(self.folder, level, chunks)

    def x0(self, level: str | None = None, chunks: int = CHUNK_PX) -> "da.Array":
        """Return a level's x0 at the last commit as a dask array: float32 (3, h, w), in latent px.

        Of a level at work only a solver of second order keeps it. Raises: as `latents`.
        """
        return predicted_x0(self.folder, level, chunks)

    def dask(
        self, level: str | None = None, region: tuple[int, int, int, int] | None = None, chunks: int = CHUNK_PX
    ) -> "da.Array":
        """Return the picture of a sampled level, decoded where it is computed, as a dask array: uint8 (3, h, w).

        `region` is (x, y, width, height) in px of the level. Bit by bit what a finished run writes.
        Raises: EngineError for a run at work, and for a picture that is no decoding of latents alone; ConfigError for
        a level or region that it has not; when computed, CanvasMismatchError if the weights are not the run's.
        """
        return decoded_on_demand(self.folder, level, region, chunks)

    def plan(self) -> str:
        """Return tiles, network calls, FLOP, memory and time of its configuration, as --plan prints them."""
        return plan_of(prepare(self.config))

    def inpaint(
        self,
        box: tuple[int, int, int, int],
        *,
        seed: int,
        from_t: int | None = None,
        folder: str | Path | None = None,
        backend: BackendName = "auto",
        progress: Reporting = True,
    ) -> "Run":
        """Sample the region (x, y, width, height) px again, noised back to timestep `from_t`; return the new run.

        Raises: EngineError; ConfigError for a region or timestep that the run has not.
        """
        finished = self._finished
        asked = InpaintConfig(str(self.folder), ",".join(map(str, box)), seed, from_t)
        where = region_folder(asked, finished) if folder is None else folder
        config = stored_config(finished.root.folder, {"output.folder": str(where)})
        config = replace(config, ray=chosen_backend(config.ray, backend))
        try:
            job: InpaintJob = prepare_inpaint(asked, finished, config)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        with ExitStack() as connection:
            return Run(redo(job, sampling_backend(job.config, connection), shown_progress(progress)))

    def view(self, height: int = 640) -> "Viewing":
        """Show the run in the viewer: in a notebook as a frame of `height` px, elsewhere at its `url`.

        It runs in a thread of this process, on loopback alone, until `stop()`. Raises: EngineError.
        """
        from engine.api.viewing import view  # few who make pictures look at them here

        return view(self.folder, height)

    def export(self, format: str = "tiff", **options: Any) -> Path:
        """Write the picture for another program; return where. Options are those of python -m engine.export.

        Raises: EngineError; ConfigError for an option that the format has not.
        """
        try:
            return export(configured(ExportConfig, None, {"run": str(self.folder), "format": format, **options}))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def _finished(self) -> FinishedRun:
        return FinishedRun(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """Return the picture, its guide and its figures for a notebook."""
        report, parts = self.report, []
        if find_picture(self.folder) is not None:
            parts.append(_inline(self.thumbnail(512), "picture"))
        if (guide := self.guide) is not None:
            parts.append(_inline(guide, "guide"))
        figures = {"seam_score": "seam score", "consistency_psnr_db": "agreement with the guide, dB"}
        said = ", ".join(f"{name} {report[key]:.2f}" for key, name in figures.items() if report.get(key) is not None)
        said = said or "not finished"
        return f"<div>{''.join(parts)}<p>{html.escape(str(self.folder))}: {said}. Synthetic.</p></div>"


def _inline(pixels: np.ndarray, title: str) -> str:
    data = io.BytesIO()
    PIL.Image.fromarray(pixels).save(data, "PNG")
    source = base64.b64encode(data.getvalue()).decode()
    style = "max-height:384px;margin-right:8px"
    return f'<img alt="{title}" title="{title}" style="{style}" src="data:image/png;base64,{source}">'
